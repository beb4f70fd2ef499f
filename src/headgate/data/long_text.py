"""Token ids of a text too long for one pass, equal to those of one pass.

A tokenizer takes a text as a whole, and its memory and one core with it: 50 MB would need gigabytes. Here the text
is encoded in overlapping pieces, and two neighbours are joined at a place where both have a token boundary and
agree on the tokens around it. Pre-tokenisation and merges look a few characters far, so they agree within the
overlap; where they do not, the overlap is doubled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy

from headgate.data.spans import Ids

from .spans import Span, edges, token_ranges

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONG = 400_000
"""Characters from which a text goes in pieces."""
PIECE, OVERLAP, AGREEMENT = 200_000, 4_000, 24
GROUP = 8
"""Pieces in one call: what the tokenizer may spread over cores, and what is in memory at once."""


def tokenise_long(
    text: str, spans: Sequence[Span], backend: Tokenizer, *, add_special_tokens: bool
) -> tuple[Ids, list[Span], int]:
    """(ids, trained index ranges, index after the text's last token).

    A text whose spans are the whole of it is joined from pieces; one with a prompt inside is encoded in one pass.
    """
    if list(spans) != [(0, len(text))]:
        encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        return _array(encoding.ids), token_ranges(encoding, spans), edges(encoding)[1]
    around = backend.encode("a", add_special_tokens=add_special_tokens)
    first, stop = edges(around)
    parts = [_array(around.ids[:first]), *map(_array, joined(text, backend))]
    end = sum(map(len, parts))
    return numpy.concatenate([*parts, _array(around.ids[stop:])]), [(first, end)], end


def _array(ids: Sequence[int]) -> Ids:
    return numpy.asarray(ids, dtype=numpy.int32)


def joined(text: str, backend: Tokenizer, piece: int = PIECE, overlap: int = OVERLAP) -> Iterator[list[int]]:
    """The ids of the text, piece after piece."""
    starts = list(range(0, max(1, len(text) - overlap), piece))
    held: tuple[list[int], list[int], list[int]] | None = (
        None  # ids, starts and ends in characters of the text
    )
    for at in range(0, len(starts), GROUP):
        group = starts[at : at + GROUP]
        texts = [text[start : start + piece + overlap] for start in group]
        for start, encoding in zip(group, backend.encode_batch(texts, add_special_tokens=False), strict=True):
            offsets = encoding.offsets
            new = (list(encoding.ids), [start + a for a, _ in offsets], [start + b for _, b in offsets])
            if held is None:
                held = new
                continue
            place = _junction(held, new, start)
            if place is None:  # no agreement: one pass over both decides
                whole = text[held[1][0] : start + piece + overlap]
                encoding, shift = backend.encode(whole, add_special_tokens=False), held[1][0]
                held = (
                    list(encoding.ids),
                    [shift + a for a, _ in encoding.offsets],
                    [shift + b for _, b in encoding.offsets],
                )
                continue
            left, right = place
            yield held[0][:left]
            held = (new[0][right:], new[1][right:], new[2][right:])
    if held is not None:
        yield held[0]


def _junction(
    left: tuple[list[int], list[int], list[int]], right: tuple[list[int], list[int], list[int]], start: int
) -> tuple[int, int] | None:
    """Indices at which the two go on alike: the same next tokens with the same ends, the middle of the agreement."""
    index = {end: i for i, end in enumerate(left[2]) if end > start}
    run = 0
    for j, end in enumerate(right[2]):
        i = index.get(end)
        if i is None and end > left[2][-1]:
            return None
        alike = i is not None and left[0][i] == right[0][j] and (not run or left[0][i - 1] == right[0][j - 1])
        run = run + 1 if alike else 0
        if run >= AGREEMENT and i is not None:
            middle = AGREEMENT // 2
            return i + 1 - middle, j + 1 - middle
    return None
