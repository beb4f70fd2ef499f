"""Memory over epochs: an example rejected in one epoch may skip even its forward in the next."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision


class ExampleMemory(FixedPrecision):
    """For each example: the epoch in which it was last scored, and whether it was rejected then.

    Fixed shape: examples are hashed into ``slots`` (two in one slot share a fate; 65,536 slots keep that below
    1% for 1,000 examples and 10% for 7,000).
    """

    stays_on_cpu = frozenset({"scored_epoch", "rejected"})
    scored_epoch: Tensor
    rejected: Tensor

    def __init__(self, slots: int, rescore_every: int) -> None:
        super().__init__()
        self.rescore_every = rescore_every
        self.register_buffer("scored_epoch", torch.full((slots,), -1, dtype=torch.long))
        self.register_buffer("rejected", torch.zeros(slots, dtype=torch.bool))

    def slots(self, example_ids: Iterable[object]) -> Tensor:
        """Slot of each example id (number or string, the same in every process)."""
        count = self.rejected.numel()
        texts = [str(int(i) if isinstance(i, Tensor) else i) for i in example_ids]
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
        return torch.tensor([int.from_bytes(d, "big") % count for d in digests])

    def rejects(self, example_ids: Iterable[object], epoch: int) -> Tensor:
        """``[B]`` bool: rejected when last scored, in an earlier epoch less than ``rescore_every`` ago."""
        slot = self.slots(example_ids)
        age = epoch - self.scored_epoch[slot]
        known = self.scored_epoch[slot] >= 0
        return known & self.rejected[slot] & (age > 0) & (age < self.rescore_every)

    def remember(self, example_ids: Iterable[object], epoch: int, accepted: bool) -> None:
        """Write down the decision on a scored micro-batch for each of its examples."""
        slot = self.slots(example_ids)
        self.scored_epoch[slot] = epoch
        self.rejected[slot] = not accepted
