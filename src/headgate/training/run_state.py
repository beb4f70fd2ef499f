"""What a run has done so far, as numbers: on this rank, on all of them, and in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headgate.training import processes
from headgate.training.figures import telemetry_of_all

COUNTED = ("trained_tokens", "flops", "summed_loss")


@dataclass
class Totals:
    """Of the run so far. ``summed_loss``: over optimizer steps, the mean loss of each."""

    trained_tokens: float
    flops: float
    summed_loss: float


@dataclass
class RunState:
    """Counters of this rank. Every rank counts what it did itself; what is read is the sum over ranks.

    Attributes:
        micro_step: micro-batches offered to this rank. flops_reported: FLOPs that ``take_flops`` has given away already.
    """

    micro_step: int = 0
    trained_tokens: Tensor | float = 0.0
    flops: Tensor | float = 0.0
    summed_loss: Tensor | float = 0.0
    flops_reported: float = 0.0

    def totals(self) -> Totals:
        """What all ranks did together. Collective."""
        tokens, flops, loss = processes.exchange(list(self.own().values()))
        return Totals(tokens, flops, loss / processes.world_size())

    def take_flops(self) -> float:
        """FLOPs of this rank since the last call."""
        total = float(self.flops)
        done, self.flops_reported = total - self.flops_reported, total
        return done

    def own(self) -> dict[str, float]:
        """The counters of this rank alone, as JSON."""
        return {name: float(getattr(self, name)) for name in COUNTED}

    def restore(self, counters: Mapping[str, Any], shares: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Continue from a checkpoint's ``counters`` (of all ranks) and each rank's share; the telemetry to go on with."""
        world = processes.world_size()
        if len(shares) == world:
            share = shares[processes.rank()]
            own, telemetry = share.get("counters", counters), share["telemetry"]
        else:  # other ranks go on: the first of them takes over what was counted
            first = float(processes.is_writer())
            own = {name: first * counters[name] for name in ("trained_tokens", "flops")}
            own["summed_loss"] = first * world * counters.get("summed_loss", 0.0)
            telemetry = telemetry_of_all([one["telemetry"] for one in shares], world)
        self.micro_step = counters["micro_step"] // world
        self.trained_tokens, self.flops = own["trained_tokens"], own["flops"]
        self.flops_reported = own["flops"]
        self.summed_loss = own.get("summed_loss", 0.0)
        restored: Mapping[str, Any] = telemetry
        return restored
