"""Guard: an older expert that trains further must not get worse at any skill it serves, or it gets its factors back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from headgate.methods.lora_experts.forward import RoutedForward
from headgate.modules.structure import Structure

TOLERANCE = 0.01
"""Share by which the loss on a skill's rows may rise and still count as no worse."""


def no_worse(before: Mapping[int, float], after: Mapping[int, float]) -> bool:
    """Losses by key of a skill; a skill without rows now has nothing against it."""
    return all(after.get(key, loss) <= loss * (1 + TOLERANCE) for key, loss in before.items())


class Guard(nn.Module):
    """``expert``: the one that is watched. ``bests``: by key of a skill, its loss so far. ``factors``: as they were then."""

    factors: Tensor

    def __init__(self, routed: RoutedForward) -> None:
        super().__init__()
        self.routed = routed
        self.expert: int | None = None
        self.bests: dict[int, float] = {}
        self.register_buffer("factors", torch.zeros(0))

    def begin(self, number: int, losses: Mapping[int, float]) -> None:
        """Watch an expert with these losses; one without any cannot be watched."""
        self.expert, self.bests = (number, dict(losses)) if losses else (None, {})
        self.factors = self._packed(number) if losses else self.factors[:0]

    def holds(self, losses: Mapping[int, float]) -> bool:
        """Take the expert as it is, where no skill got worse; else give it its factors back, bit for bit."""
        assert self.expert is not None
        if not no_worse(self.bests, losses):
            self._unpack(self.expert)
            return False
        bests = {key: min(best, losses.get(key, best)) for key, best in self.bests.items()}
        self.begin(self.expert, bests)
        return True

    def _packed(self, number: int) -> Tensor:
        parts = self.routed.experts.parts(number)
        return torch.cat([t.detach().flatten() for part in parts for t in (part.down, part.up)])

    def _unpack(self, number: int) -> None:
        parts = list(self.routed.experts.parts(number))
        sizes = [t.numel() for part in parts for t in (part.down, part.up)]
        if sum(sizes) == len(self.factors):  # an expert that was widened since keeps what it has
            flat = iter(self.factors.split(sizes))
            pairs = [(next(flat).view_as(part.down), next(flat).view_as(part.up)) for part in parts]
            self.routed.experts.write(number, pairs)

    def structure(self) -> Structure:
        bests = [[key, loss] for key, loss in self.bests.items()]
        return {"expert": self.expert, "bests": bests, "factors": len(self.factors)}

    def restore(self, structure: Structure) -> None:
        self.expert, self.bests = structure["expert"], {int(k): loss for k, loss in structure["bests"]}
        self.factors = torch.zeros(structure["factors"], device=self.factors.device)
