"""What a page is made of. Sections hold these; the HTML and the Markdown template render the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True)
class Text:
    """A paragraph. ``tone``: plain, or a warning that is set apart."""

    text: str
    tone: Literal["plain", "warning"] = "plain"
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Cells are strings, the first one of a row is its heading; ``numeric`` columns are right-aligned."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Panel:
    """One drawing: ``key`` names its files, ``alt`` says in words what is to be seen."""

    key: str
    drawing: Drawing
    alt: str


@dataclass(frozen=True)
class Figure:
    """Panels under one caption; the caption says n and the seeds."""

    title: str
    caption: str
    panels: Sequence[Panel]
    kind: str = "figure"


@dataclass(frozen=True)
class Example:
    """One item that two arms answered differently."""

    heading: str
    prompt: str
    gold: str
    answers: Sequence[tuple[str, str]]
    """(arm, output) of the baseline and of the other arm."""


@dataclass(frozen=True)
class Examples:
    """Items behind a fold."""

    title: str
    examples: Sequence[Example]
    kind: str = "examples"


@dataclass(frozen=True)
class TokenMap:
    """A text whose tokens stand on a ground as dark as their ``shares`` in [0, 1]."""

    title: str
    tokens: Sequence[str]
    shares: Sequence[float]
    kind: str = "tokens"


@dataclass(frozen=True)
class Verbatim:
    """A file's text behind a fold."""

    title: str
    text: str
    kind: str = "verbatim"


Block = Text | Table | Figure | Examples | TokenMap | Verbatim


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    key: str
    title: str
    blocks: Sequence[Block] = field(default=())

    @property
    def figures(self) -> list[Figure]:
        return [block for block in self.blocks if isinstance(block, Figure)]
