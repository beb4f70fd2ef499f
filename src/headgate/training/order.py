"""The order of training examples: a pure function of (seed, epoch), equal in every arm and after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

from headgate.methods.stage import ScheduledStage
from headgate.ops.randomness import generator

GROUP_BATCHES = 50


class LengthGroupedOrder(Sampler[int]):
    """Shuffled, then sorted by length inside chunks of 50 batches, then the batches shuffled.

    Batches hold rows of similar length, so little padding, while the order stays random from batch to batch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        stream = generator(self.seed, self.epoch, "data_order")
        order = torch.randperm(len(self.lengths), generator=stream).tolist()
        chunk = self.batch_size * GROUP_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), chunk):
            members = sorted(order[start : start + chunk], key=lambda i: -self.lengths[i])
            batches += [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
        ragged = [batch for batch in batches if len(batch) < self.batch_size]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        for index in torch.randperm(len(full), generator=stream).tolist():
            yield from full[index]
        for batch in ragged:
            yield from batch


class StreamOrder(Sampler[int]):
    """Stage after stage, each from its own view: ``views[name]`` is a range of indices of one data set.

    A stage longer than its view goes round it again, in a new order.
    """

    def __init__(
        self,
        scheduled: Sequence[ScheduledStage],
        views: Mapping[str, range],
        examples_per_step: int,
        seed: int,
    ) -> None:
        self.scheduled, self.views, self.seed = scheduled, views, seed
        self.examples_per_step = examples_per_step

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.scheduled) * self.examples_per_step

    def __iter__(self) -> Iterator[int]:
        for scheduled in self.scheduled:
            name = scheduled.stage.data
            view = self.views[name] if name is not None else range(max(v.stop for v in self.views.values()))
            wanted, turn = scheduled.steps * self.examples_per_step, 0
            while wanted > 0:
                stream = generator(self.seed, turn, f"data_order.{scheduled.name}")
                order = torch.randperm(len(view), generator=stream).tolist()[:wanted]
                yield from (view[i] for i in order)
                wanted, turn = wanted - len(order), turn + 1
