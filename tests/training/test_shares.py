"""The rows of every optimizer step are those of one process, whatever the ranks, batch and number of rows."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from headgate.training.shares import TrainingShare, in_reading_order, spread


def windows(batches: list[list[int]], size: int) -> list[list[int]]:
    """Rows of every optimizer step of ``size`` micro-batches."""
    stream, steps = iter(batches), []
    while window := list(islice(stream, size)):
        steps.append(sorted(row for batch in window for row in batch))
    return steps


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rows", range(4, 40))
def test_a_step_has_the_rows_of_one_process(rows: int, accumulation: int, ranks: int) -> None:
    whole: Any = BatchSampler(range(rows), 2, drop_last=False)
    shares = [TrainingShare(whole, ranks, rank) for rank in range(ranks)]
    parts = [list(share) for share in shares]
    assert {len(part) for part in parts} == {len(shares[0])}, "every rank takes part in every reduction"
    steps = [windows(part, accumulation) for part in parts]
    together = [sorted(row for part in step for row in part) for step in zip(*steps, strict=True)]
    wanted = windows(list(whole), ranks * accumulation)
    left = rows % (2 * ranks)
    if 0 < left < ranks:  # fewer rows than ranks are left: one of them is repeated
        assert together[:-1] == wanted[:-1] and set(together[-1]) == set(wanted[-1])
    else:
        assert together == wanted


@pytest.mark.parametrize("rows", range(1, 20))
def test_a_validation_is_read_once_and_in_order(rows: int) -> None:
    whole: Any = BatchSampler(range(rows), 3, drop_last=False)
    parts = [list(BatchSamplerShard(whole, 2, rank, even_batches=False)) for rank in range(2)]
    assert in_reading_order(parts) == list(whole)


def test_rows_are_spread_in_order() -> None:
    assert spread([1, 2, 3, 4, 5], 3) == [[1, 2], [3, 4], [5]]
    assert spread([1, 2], 3) == [[1], [2], [1]]
