"""Best-fit-decreasing packing of whole documents, without attention or loss across them.

Every document keeps its order and is never divided. ``position_ids`` restart at each document: with no attention
mask, transformers builds block-diagonal attention from the restarts. ``segment_ids`` number the documents of a
row, so that methods can treat each as a sample of its own. (TRL's packer drops every column that is not a list
of tokens; methods need ``example_id`` and tags per document.)
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import datasets

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from .templates import IGNORED

_TOKEN_COLUMNS = {"input_ids", "labels", "length", "prompt_length"}


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices: longest first, each into the fullest bin that still holds it (Johnson, 1973)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    bins: list[list[int]] = []
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise DataError(f"a document of {length} tokens does not fit in rows of {capacity}")
        place = bisect.bisect_left(free, (length, -1))
        room, number = free.pop(place) if place < len(free) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        if room > length:
            bisect.insort(free, (room - length, number))
    return bins


def pack(rows: Sequence[RawRow], max_length: int) -> datasets.Dataset:
    """Packed rows: token columns joined, other columns as lists with one entry per document.

    The first label of a document is ignored: the causal shift would have the previous document predict it.
    """
    packed = []
    for members in best_fit_decreasing([len(row["input_ids"]) for row in rows], max_length):
        documents = [rows[i] for i in members]
        ids, labels, positions, segments = list[int](), list[int](), list[int](), list[int]()
        for segment, document in enumerate(documents):
            length = len(document["input_ids"])
            ids += document["input_ids"]
            labels += [IGNORED, *document["labels"][1:]]
            positions += range(length)
            segments += [segment] * length
        merged: dict[str, object] = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "segment_ids": segments,
        }
        for name in documents[0]:
            if name not in _TOKEN_COLUMNS:
                merged[name] = [document[name] for document in documents]
        merged["length"] = len(ids)
        packed.append(merged)
    return datasets.Dataset.from_list(packed)
