"""FeatureSketch: the leading directions of everything a router has read, in constant memory.

Legend: M rows given, F features, K directions.
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
    def add(self, features_MF: Tensor) -> None:
        k = self.directions
        if not k or not len(features_MF):
            return
        chosen = torch.linspace(0, len(features_MF) - 1, k, device=features_MF.device).long()
        self.rows[k:] = features_MF[chosen]
        self.rows.copy_(shrink(self.rows, k))

    @torch.no_grad()
    def basis(self) -> Tensor | None:
        """Orthonormal ``[F, K]``; None while nothing was added."""
        if not self.directions or not bool(self.rows.any()):
            return None
        return top_directions(self.rows, self.directions)
