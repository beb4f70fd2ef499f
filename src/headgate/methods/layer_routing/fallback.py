"""Fallback: where routing does not beat the best fixed mask of its depth on validation data, the mask is served."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Fallback(nn.Module):
    """Buffers: the best ``mask`` ``[G]``, ``losses`` of router and mask, and whether the mask is in use (``active``).

    ``settled``: for good, training included; the router then decides nothing any more.
    """

    mask: Tensor
    losses: Tensor
    active: Tensor
    settled: Tensor

    def __init__(self, num_gates: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(num_gates))
        self.register_buffer("losses", torch.full((2,), torch.nan))
        self.register_buffer("active", torch.zeros((), dtype=torch.bool))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))

    def serves(self, training: bool) -> bool:
        """Whether the mask decides, in training or at inference."""
        return bool(self.settled if training else self.active)

    def hold(self, mask: Tensor) -> None:
        """``mask`` is the one to beat, and served until a router is held against it."""
        self.mask.copy_(mask)
        self.losses.fill_(torch.nan)
        self.active.fill_(True)
        self.settled.fill_(False)

    def settle(self) -> None:
        """For good: the mask where it is served now, the router's choices where they are not."""
        self.settled.copy_(self.active)

    def choose(self, mask: Tensor, loss: Callable[[Tensor | None], float]) -> None:
        """Hold ``mask`` against the router: ``loss`` under a mask, or as the router decides (None)."""
        self.withdraw()  # the router is measured as it decides
        router, fixed = loss(None), loss(mask)
        self.mask.copy_(mask)
        self.losses.copy_(torch.tensor([router, fixed]))
        self.active.fill_(fixed <= router)

    def withdraw(self) -> None:
        """The router is served again, until the next choice."""
        self.active.fill_(False)

    def figures(self, gates_per_block: int, first_block: int) -> dict[str, str | float | list[int]]:
        """What a result says: who is served, both losses, the blocks that the mask skips; {} before a validation."""
        if bool(self.losses.isnan().any()):
            return {}
        closed = self.mask[::gates_per_block] == 0
        return {
            "routing_in_use": "mask" if bool(self.active) else "router",
            "routing_loss_router": float(self.losses[0]),
            "routing_loss_mask": float(self.losses[1]),
            "routing_mask_skips": [first_block + int(place) for place in closed.nonzero()[:, 0]],
        }
