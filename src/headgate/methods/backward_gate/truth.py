"""The truth of a stream, where a data column knows it: what an oracle gate reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from headgate.errors import DataError
from headgate.methods.step import Step

TRUTH = "gate_truth"
"""Batch column: 1 for a row that is new, 0 for another."""


def truth_maker(column: str, values: Sequence[object] | None) -> Callable[[Mapping[str, object]], int]:
    """A function of a normalised row: is its ``column`` true, or among ``values``? Raises DataError where it is missing."""

    def truth(row: Mapping[str, object]) -> int:
        if row.get(column) is None:
            raise DataError(
                f"score: oracle reads column {column!r}, which row {row.get('example_id')!r} does not have (it has: "
                f"{', '.join(name for name, value in row.items() if value is not None)}): name one of them as column"
            )
        return int(bool(row[column]) if values is None else row[column] in values)

    return truth


def share_of_new(step: Step) -> float:
    """Share of a micro-batch's rows (packed: documents) that are new, over all ranks."""
    column = step.batch[TRUTH]
    if not isinstance(column, torch.Tensor):  # packed rows hold a list per row
        column = torch.tensor([value for row in column for value in row])
    counts = torch.stack([column.float().sum(), torch.tensor(float(column.numel()))])
    new, rows = step.sum_across_ranks(counts).tolist()
    return float(new) / max(1.0, float(rows))
