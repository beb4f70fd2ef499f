"""Rows as tokens on disk: made once by several processes, then mapped into memory by every arm, seed and rank.

A store is named by everything that its content follows from: the rows' content, the tokenizer, the chat template,
the limits and this package's code. ``datasets.map`` makes it, in batches that stay in Arrow and numpy; its shards and a
summary lie in one folder of the cache.
"""

from __future__ import annotations

import hashlib
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy
import pyarrow

from headgate.data.spans import Ids
from headgate.errors import DataError

from .cache import code_version, digest, entry
from .mask_check import check_masks
from .rendering import NO_TEMPLATE
from .row_store import plain_rows, with_fingerprint
from .templates import EncodedRow, PromptTooLong, check_room, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = ("prompt", "completion", "messages", "tools", "text")
"""Columns that become tokens; the others stand beside them in the store."""
BATCH = 250
ROWS_PER_PROCESS = 4000
_DIGESTS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, str]] = weakref.WeakKeyDictionary()


class BatchEncoder:
    """A batch of normalised rows (an Arrow table) as token rows; what ``datasets.map`` runs in its processes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str, long_prompts: str
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.loss_on, self.long_prompts = loss_on, long_prompts

    def __call__(self, table: pyarrow.Table, indices: list[int]) -> pyarrow.Table:
        content = table.select([name for name in (*CONTENT, "example_id") if name in table.column_names])
        rows = list(plain_rows(content))
        pieces: list[tuple[int, Ids, Ids, int, bool]] = []  # row, ids, labels, prompt length, truncated
        for number, (row, encoded) in enumerate(
            zip(rows, encode_rows(rows, self.tokenizer, self.loss_on), strict=True)
        ):
            pieces += [(number, *piece) for piece in self._pieces(row, encoded)]
        kept = [name for name in table.column_names if name not in CONTENT]
        numbers = [piece[0] for piece in pieces]
        columns = {name: table[name].take(pyarrow.array(numbers, pyarrow.int64())) for name in kept}
        lengths = numpy.array([len(piece[1]) for piece in pieces], dtype=numpy.int32)
        columns |= {
            "input_ids": _lists([piece[1] for piece in pieces], lengths),
            "labels": _lists([piece[2] for piece in pieces], lengths),
            "length": lengths,
            "prompt_length": numpy.array([piece[3] for piece in pieces], dtype=numpy.int32),
            "trained": numpy.array([int((piece[2] >= 0).sum()) for piece in pieces], dtype=numpy.int32),
            "truncated": numpy.array([piece[4] for piece in pieces], dtype=bool),
            "row": numpy.array([indices[number] for number in numbers], dtype=numpy.int64),
        }
        return pyarrow.table(columns)

    def _pieces(self, row: dict[str, object], encoded: EncodedRow) -> Iterator[tuple[Ids, Ids, int, bool]]:
        """A long text goes on in the next row; other rows are cut on the right, and left out with nothing trained."""
        ids, labels, limit = encoded.ids, encoded.labels(), self.max_length
        if row.get("text") is not None:
            for start in range(0, len(ids), limit):
                part = ids[start : start + limit]
                if start == 0 or len(part) > 1:  # a lone token has no successor to predict
                    yield part, labels[start : start + limit], 0, False
            return
        if len(ids) > limit:
            try:
                check_room(row, encoded, limit)
            except PromptTooLong:
                if self.long_prompts == "error":
                    raise
                return
        if (labels[:limit] >= 0).any():
            yield ids[:limit], labels[:limit], min(encoded.prompt_length, limit), len(ids) > limit


def _lists(arrays: list[Ids], lengths: Ids) -> pyarrow.Array:
    offsets = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32)
    values = numpy.concatenate(arrays) if arrays else numpy.empty(0, dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values, pyarrow.int32()))


def tokens_of(rows: datasets.Dataset, encoder: BatchEncoder) -> tuple[datasets.Dataset, dict[str, object]]:
    """The token rows of ``rows`` and what preparing them said, from the store where they are there."""
    key = digest(
        rows._fingerprint,
        tokenizer_digest(encoder.tokenizer),
        encoder.max_length,
        encoder.loss_on,
        encoder.long_prompts,
        code_version(),
    )

    def fill(folder: Path) -> dict[str, object]:
        return _fill(rows, encoder, folder, key)

    folder, summary = entry("tokens", key, fill)
    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("tokens*.arrow"))]
    tokens = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return with_fingerprint(tokens, key), summary


def _fill(rows: datasets.Dataset, encoder: BatchEncoder, folder: Path, key: str) -> dict[str, object]:
    summary = check_sample(rows, encoder)
    processes = min(workers(), max(1, len(rows) // ROWS_PER_PROCESS))
    with _progress(len(rows)):
        rows.with_format("arrow").map(
            encoder,
            batched=True,
            batch_size=BATCH,
            with_indices=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=rows.column_names,
            cache_file_name=str(folder / "tokens.arrow"),
            load_from_cache_file=False,
            new_fingerprint=key,
            desc="prepare",
        )
    if not any(folder.glob("tokens*.arrow")):
        raise DataError("no row has a token to train on: check max_length, loss_on and the completions")
    return summary


def check_sample(rows: datasets.Dataset, encoder: BatchEncoder) -> dict[str, object]:
    """The trained tokens of a sample against their source, and whether an end is trained. Errors come before work."""
    tokenizer, step = encoder.tokenizer, max(1, len(rows) // 32)
    sample = list(rows.select(range(0, len(rows), step)))
    if any(row.get("messages") is not None for row in sample) and not getattr(
        tokenizer, "chat_template", None
    ):
        raise DataError(NO_TEMPLATE)
    short = [row for row in sample if len(row.get("text") or "") < 100_000]
    encoded = encode_rows(short, tokenizer, encoder.loss_on)
    check_masks(short, encoded, tokenizer, encoder.loss_on)
    notes = []
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end-of-sequence token: completions are trained without an end")
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    chats = [one for row, one in zip(short, encoded) if row.get("messages") is not None and one.ranges]
    if chats and not any(int(one.ids[one.ranges[-1][1] - 1]) in special for one in chats):
        notes.append(
            "the chat template ends assistant turns with no special token that is trained: the model does not learn "
            "to stop; use a template that ends them"
        )
    return {"checked": len(short), "notes": notes}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything about a tokenizer that ids, masks and templates follow from."""
    state = (tokenizer.chat_template, tokenizer.eos_token_id, len(tokenizer))
    known = _DIGESTS.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]
    content = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    value = digest(content, *state)
    _DIGESTS[tokenizer] = (state, value)
    return value


def workers() -> int:
    """Processes that prepare data: ``HEADGATE_WORKERS``, else one for every core that this process may use."""
    given = os.environ.get("HEADGATE_WORKERS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(given) if given else min(cores, 16))


@contextmanager
def _progress(rows: int) -> Iterator[None]:
    """The bar of ``datasets`` for work that takes long, on a terminal only."""
    shown = rows >= 10_000 and sys.stderr.isatty()
    was = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if was else datasets.enable_progress_bars)()
