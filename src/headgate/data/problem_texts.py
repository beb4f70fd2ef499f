"""What tags and novelty look at: the text of every training row, decoded only where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import datasets

from headgate.data.readers.base import RawRow


def text_of(row: RawRow) -> str:
    """The problem text of a normalised row."""
    return str(row.get("prompt") or row.get("text") or row.get("messages"))


class Texts(Sequence[str]):
    """The problem texts of data sets, end to end, read when they are used: a million rows need no memory."""

    def __init__(self, parts: Sequence[datasets.Dataset]) -> None:
        names = ("prompt", "text", "messages")
        self.parts = [part.select_columns([n for n in names if n in part.column_names]) for part in parts]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[str]:
        return (text_of(row) for part in self.parts for row in part)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        for part in self.parts:
            if index < len(part):
                return text_of(part[index])
            index -= len(part)
        raise IndexError(index)
