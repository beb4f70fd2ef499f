"""What preparation did, in numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import numpy


@dataclass(frozen=True)
class DataReport:
    """What preparation did. ``padding_estimate`` is the share of pad tokens that batches of 8 would have."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped: int
    max_length: int
    padding_estimate: float
    length_histogram: dict[int, int]
    """Number of rows by length, in bins of 64 tokens named by their upper end."""
    masks_checked: int = 0
    """Rows whose trained tokens were decoded and set against the source."""
    notes: list[str] = field(default_factory=list)
    mix: dict[str, float] = field(default_factory=dict)
    """Of a mixture: the share of drawn rows of every source."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        cut = f", {self.truncated} truncated to {self.max_length}" if self.truncated else ""
        dropped = f", {self.dropped} dropped (no completion within it)" if self.dropped else ""
        mix = ", ".join(f"{share:.1%} {name}" for name, share in self.mix.items())
        return (
            f"{self.rows} rows, {self.tokens} tokens{cut}{dropped}, padding about {self.padding_estimate:.0%}"
            + (f", mixed {mix}" if mix else "")
        )


def report_of(
    tokens: datasets.Dataset, source_rows: int, max_length: int, grouped: bool, summary: dict[str, Any]
) -> DataReport:
    """The account of token rows that ``source_rows`` rows became."""
    lengths, trained = column(tokens, "length"), column(tokens, "trained")
    bins, counts = numpy.unique(-(-lengths // 64) * 64, return_counts=True)
    return DataReport(
        rows=len(tokens),
        tokens=int(lengths.sum()),
        trained_tokens=int(trained.sum()),
        truncated=int(column(tokens, "truncated").sum()),
        dropped=source_rows - len(numpy.unique(column(tokens, "row"))),
        max_length=max_length,
        padding_estimate=padding_estimate(lengths.tolist(), 8, grouped),
        length_histogram={int(end): int(count) for end, count in zip(bins, counts)},
        masks_checked=int(summary["checked"]),
        notes=list(summary["notes"]),
    )


def column(tokens: datasets.Dataset, name: str) -> Any:
    """A column of numbers as one array."""
    return tokens.with_format("numpy", columns=[name])[:][name]


def padding_estimate(lengths: Sequence[int], batch_size: int, grouped: bool) -> float:
    """Share of pad tokens in right-padded batches of shuffled (or length-grouped) rows."""
    order = sorted(lengths) if grouped else random.Random(0).sample(list(lengths), len(lengths))
    widest = numpy.maximum.reduceat(order, numpy.arange(0, len(order), batch_size))
    sizes = numpy.diff([*range(0, len(order), batch_size), len(order)])
    return float(1 - sum(lengths) / (widest * sizes).sum())
