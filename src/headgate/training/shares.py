"""Which rows a rank takes: those that one process would read in the same optimizer step.

    W ranks x accumulation A  ==  one process x accumulation W A        (the same batches in every optimizer step)

Whole batches are dealt round robin. A pass over the data may end with fewer batches than ranks: their rows are then
spread over the ranks. Only where fewer rows than ranks are left do some ranks repeat one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from accelerate.data_loader import BatchSamplerShard

from headgate.errors import TrainingError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from headgate.models.anatomy import Batch

T = TypeVar("T")


class TrainingShare(BatchSamplerShard):
    """accelerate's share of a batch sampler, without the rows it repeats to make the last batches whole."""

    def __len__(self) -> int:
        batches, ranks = len(self.batch_sampler), int(self.num_processes)
        return -(-batches // ranks)

    def __iter__(self) -> Iterator[list[int]]:
        group: list[list[int]] = []
        for batch in self.batch_sampler:
            group.append(list(batch))
            if len(group) == self.num_processes:
                yield group[self.process_index]
                group = []
        if group:
            rows = [row for batch in group for row in batch]
            yield spread(rows, self.num_processes)[self.process_index]


def spread(rows: list[int], ranks: int) -> list[list[int]]:
    """``rows`` in order over the ranks, as evenly as they go; no rank is left without one."""
    size, more = divmod(len(rows), ranks)
    if size == 0:
        return [[rows[rank % len(rows)]] for rank in range(ranks)]
    starts = [rank * size + min(rank, more) for rank in range(ranks + 1)]
    return [rows[start:stop] for start, stop in pairwise(starts)]


def deal_training(loader: DataLoader[Batch]) -> None:
    """Give this rank its share of the batches of a training loader that accelerate has prepared."""
    if isinstance(loader.batch_sampler, BatchSamplerShard):
        loader.batch_sampler.__class__ = TrainingShare  # torch lets no loader change its sampler


def deal_validation(loader: DataLoader[Batch], *, whole: bool) -> bool:
    """Every rank reads its share of a validation, no row twice; or all of it: for methods that watch it, and where
    there are fewer batches than ranks. Returns whether every rank reads all."""
    share = loader.batch_sampler
    if not isinstance(share, BatchSamplerShard):
        return whole
    share.even_batches = False
    whole = whole or len(share.batch_sampler) < int(share.num_processes)
    if whole:
        share.num_processes, share.process_index = 1, 0
    return whole


def dealt(loader: DataLoader[Batch]) -> tuple[int, int]:
    """(batches that this rank reads of a dealt validation, the most that any rank reads)."""
    share = loader.batch_sampler
    if not isinstance(share, BatchSamplerShard):
        return len(loader), len(loader)
    return len(share), -(-len(share.batch_sampler) // int(share.num_processes))


def in_step(batches: Iterable[T], rounds: int) -> Iterator[T]:
    """``batches``, the last of them again until there were ``rounds``: ranks that share a model's weights run their
    forwards together. Raises TrainingError where there is none to repeat."""
    last: T | None = None
    count = 0
    for batch in batches:
        yield batch
        last, count = batch, count + 1
    if count >= rounds:
        return
    if last is None:
        raise TrainingError(
            "a rank was dealt no validation rows, and its forwards are needed: use fewer ranks"
        )
    for _ in range(count, rounds):
        yield last


def in_reading_order(parts: list[list[T]]) -> list[T]:
    """What every rank made of its share of the batches, as one process would have made it."""
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]
