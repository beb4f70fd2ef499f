"""The order of training examples: a pure function of (seed, epoch), equal in every arm and after a resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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


IN_ORDER = "in_order"
"""Stage option: the stage's rows lie in the order in which they are to be read."""


def endless_order(seed: int, stage: str, rows: int) -> Iterator[int]:
    """Indices of a stage's rows: pass after pass, each in an order of its own."""
    for turn in itertools.count():
        stream = generator(seed, turn, f"data_order.{stage}")
        yield from torch.randperm(rows, generator=stream).tolist()


@dataclass(frozen=True)
class Replay:
    """Each row of a batch is one of an earlier skill with chance ``ratio``, from ``per_skill`` rows kept of each."""

    ratio: float
    per_skill: int


class StreamOrder(Sampler[int]):
    """Stage after stage, each from its own view: ``views[name]`` is a range of indices of one data set.

    A stage longer than its view goes round it again, in a new order. With ``replay``, which rows are replayed and
    which rows they are follows from (seed, optimizer step) alone: there is nothing to save.
    """

    def __init__(
        self,
        scheduled: Sequence[ScheduledStage],
        views: Mapping[str, range],
        examples_per_step: int,
        seed: int,
        replay: Replay | None = None,
    ) -> None:
        self.scheduled, self.views, self.seed = scheduled, views, seed
        self.examples_per_step, self.replay = examples_per_step, replay

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.scheduled) * self.examples_per_step

    def __iter__(self) -> Iterator[int]:
        for scheduled in self.scheduled:
            own, earlier = self._own(scheduled), self._earlier(scheduled)
            for step in range(scheduled.start, scheduled.stop):
                replayed = self._replayed(step, earlier)
                for slot in range(self.examples_per_step):
                    yield replayed[slot] if slot in replayed else next(own)

    def _own(self, scheduled: ScheduledStage) -> Iterator[int]:
        """The stage's view again and again, in a new order each time; or as it lies, where its order was prepared."""
        name = scheduled.stage.data
        view = self.views[name] if name is not None else range(max(v.stop for v in self.views.values()))
        if scheduled.stage.options.get(IN_ORDER):
            return itertools.cycle(view)
        return (view[i] for i in endless_order(self.seed, scheduled.name, len(view)))

    def _earlier(self, scheduled: ScheduledStage) -> list[int]:
        """The rows kept of the other skills that came before."""
        if self.replay is None:
            return []
        views = {_skill(before): before.stage.data for before in self.scheduled[: scheduled.index]}
        kept: list[int] = []
        for skill, name in views.items():
            if skill != _skill(scheduled) and name is not None:
                view, stream = self.views[name], generator(self.seed, 0, f"replay.{skill}")
                order = torch.randperm(len(view), generator=stream)[: self.replay.per_skill]
                kept += [view[i] for i in order.tolist()]
        return kept

    def _replayed(self, step: int, earlier: Sequence[int]) -> dict[int, int]:
        """Slot of the step's examples -> the earlier row that stands there."""
        if self.replay is None or not earlier:
            return {}
        stream = generator(self.seed, step, "replay")
        chosen = torch.rand(self.examples_per_step, generator=stream) < self.replay.ratio
        rows = torch.randint(len(earlier), (self.examples_per_step,), generator=stream)
        return {slot: earlier[int(rows[slot])] for slot in chosen.nonzero().flatten().tolist()}


def _skill(scheduled: ScheduledStage) -> str:
    """A segment's skill; the same where it recurs."""
    return str(scheduled.stage.options.get("skill", scheduled.stage.data))
