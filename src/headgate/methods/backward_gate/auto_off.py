"""auto_off: stop gating when, in measured seconds, it does not pay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from headgate.methods.step import Step
from headgate.modules.fixed_precision import FixedPrecision
from headgate.ops.payoff import advantage

log = logging.getLogger("headgate")
BLOCK = 25
SCHEDULE = (True, False, False, True, True, False, False, True)
"""Gated and ungated blocks in ABBA order, so that a loss falling at an even pace favours neither."""


class AutoOff(FixedPrecision):
    """A trial of 200 optimizer steps after the burn-in, half gated and half not; then one verdict.

    Progress of a block is the drop of the mean loss of *all* offered micro-batches between its two halves;
    a verdict compares seconds per unit of progress. It depends on measured time, so a run with ``auto_off`` is
    the one kind that a resume does not repeat bit by bit.
    """

    stays_on_cpu = frozenset({"steps", "seconds", "halves", "off", "decided"})
    steps: Tensor
    seconds: Tensor
    halves: Tensor
    off: Tensor
    decided: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("seconds", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("halves", torch.zeros(2, 2, 2, dtype=torch.float64))
        self.register_buffer("off", torch.zeros((), dtype=torch.bool))
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool))
        self.begin_window()

    def begin_window(self) -> None:
        """An accumulation window starts: its losses and its time are the next record."""
        self._began, self._losses = time.perf_counter(), list[Tensor]()

    def micro_batch(
        self,
        loss: Tensor | None,
        *,
        last: bool,
        sum_across_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> bool:
        """Take one micro-batch's mean loss (None: not run); with the ``last`` of its window, as ``add``.

        Several ranks judge by the mean of their losses and times, so that all come to the same verdict.
        """
        if loss is not None:
            self._losses.append(loss)
        if not last or not self._losses:
            return False
        mine = [float(torch.stack(self._losses).mean()), time.perf_counter() - self._began, 1.0]
        loss_sum, seconds, ranks = sum_across_ranks(torch.tensor(mine, dtype=torch.float64)).tolist()
        return self.add(loss_sum / ranks, seconds / ranks)

    def after(self, step: Step) -> None:
        """Take a micro-batch of the trial; says so when it ends the gating."""
        if self.micro_batch(step.task_loss, last=step.is_window_end, sum_across_ranks=step.sum_across_ranks):
            log.warning(
                "backward_gate switched itself off: loss fell %.3g per second gated, %.3g ungated",
                self.speed(1),
                self.speed(0),
            )

    def gated(self) -> bool:
        """Whether the coming micro-batch is gated."""
        if bool(self.decided):
            return not bool(self.off)
        return SCHEDULE[min(int(self.steps) // BLOCK, len(SCHEDULE) - 1)]

    def add(self, loss: float, seconds: float) -> bool:
        """Record one optimizer step of the trial; True when the verdict has just fallen and it is *off*."""
        if bool(self.decided):
            return False
        arm = int(self.gated())
        half = int(int(self.steps) % BLOCK >= BLOCK // 2)
        self.seconds[arm] += seconds
        self.halves[arm, half, 0] += loss
        self.halves[arm, half, 1] += 1
        self.steps += 1
        if int(self.steps) == BLOCK * len(SCHEDULE):
            self.decided.fill_(True)
            self.off.fill_(not self.pays())
            return bool(self.off)
        return False

    def pays(self) -> bool:
        """The probe's rule (``ops.payoff.advantage``) on what was measured, per offered micro-batch."""
        gated, ungated = self.progress(1), self.progress(0)
        if ungated <= 0:  # nothing is learned ungated: a gate pays where it learns at all, or costs less
            return gated > 0 or self.cost() < 1
        return advantage(gated / ungated, 1.0, self.cost()) >= 1

    def cost(self) -> float:
        """Seconds of a gated micro-batch by those of an ungated one."""
        return float(self.seconds[1] / self.seconds[0].clamp(min=1e-9))

    def progress(self, arm: int) -> float:
        """Fall of the loss over the gated (1) or ungated (0) blocks."""
        first, second = self.halves[arm, :, 0] / self.halves[arm, :, 1].clamp(min=1)
        return float(first - second)

    def speed(self, arm: int) -> float:
        """Loss progress per second of the gated (1) or ungated (0) blocks."""
        return self.progress(arm) / float(self.seconds[arm].clamp(min=1e-9))
