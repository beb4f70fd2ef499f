"""FeatureSketch: the leading directions of everything a router has read, in constant memory.

Legend: B batch, T tokens, F features, K directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headgate.ops.subspace import shrink, top_directions


class FeatureSketch(nn.Module):
    """Frequent Directions (Ghashami et al. 2016) over feature rows, of which every step adds K at even spacing.

    ``directions`` 0 keeps nothing.
    """

    rows: Tensor

    def __init__(self, features: int, directions: int) -> None:
        super().__init__()
        self.directions = directions
        self.register_buffer("rows", torch.zeros(2 * directions, features))

    @torch.no_grad()
    def add(self, features_BTF: Tensor, valid_BT: Tensor) -> None:
        """Take K of the valid rows. How many there are is never asked of the device: where there is none, nothing moves."""
        k = self.directions
        if not k:
            return
        seen_N = valid_BT.flatten().cumsum(0)
        chosen_K = torch.searchsorted(seen_N, evenly(seen_N[-1], k) + 1).clamp(max=len(seen_N) - 1)
        rows = torch.cat([self.rows[:k], features_BTF.flatten(0, 1)[chosen_K].to(self.rows)])
        self.rows.copy_(torch.where(seen_N[-1] > 0, shrink(rows, k), self.rows))

    @torch.no_grad()
    def basis(self) -> Tensor | None:
        """Orthonormal ``[F, K]``; None while nothing was added."""
        if not self.directions or not bool(self.rows.any()):
            return None
        return top_directions(self.rows, self.directions)


def evenly(count: Tensor, k: int) -> Tensor:
    """``k`` of ``0 .. count - 1`` at even spacing, both ends among them: ``linspace(0, count - 1, k)`` by its own formula."""
    place_K, last = torch.arange(k, device=count.device), count - 1
    step = last.float() / max(k - 1, 1)
    return torch.where(place_K < k // 2 + (k == 1), step * place_K, last - step * (k - 1 - place_K)).long()
