"""AcceptedSubspace: the directions of the sketches that were accepted, in fixed-shape buffers.

Shapes: M sketch size, K directions, R buffer rows (2L with L = 2K).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision
from headgate.ops import subspace

Basis = Literal["frequent_directions", "bisector"]


class AcceptedSubspace(FixedPrecision):
    """Orthonormal ``basis_MK`` of accepted unit sketches; unused columns are zero.

    ``frequent_directions`` keeps a 2L-row Frequent Directions sketch (L = 2K, optional decay of old rows) and
    takes its top K directions every ``refresh`` updates. ``bisector`` is a recency tracker in O(MK). While the
    basis still has room, both take a new direction in at once (Gram-Schmidt).
    """

    basis_MK: Tensor
    buffer_RM: Tensor
    rows: Tensor
    rank: Tensor
    updates: Tensor

    def __init__(
        self,
        sketch_size: int,
        directions: int,
        *,
        basis: Basis = "frequent_directions",
        decay: float = 1.0,
        refresh: int = 8,
        reorthonormalize_every: int = 128,
    ) -> None:
        super().__init__()
        self.kind, self.decay, self.refresh, self.every = basis, decay, refresh, reorthonormalize_every
        self.sketch_rows = 2 * directions
        rows = 2 * self.sketch_rows if basis == "frequent_directions" else 0
        self.register_buffer("basis_MK", torch.zeros(sketch_size, directions))
        self.register_buffer("buffer_RM", torch.zeros(rows, sketch_size))
        for name in ("rows", "rank", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))

    stays_on_cpu = frozenset({"rows", "rank", "updates"})

    def novelty(self, unit_M: Tensor) -> Tensor:
        """``[...]`` share of unit sketches ``[..., M]`` outside the subspace."""
        return subspace.gradient_novelty(unit_M, self.basis_MK)

    @torch.no_grad()
    def update(self, unit_M: Tensor) -> None:
        """Take an accepted unit sketch in."""
        self.updates += 1
        grew = self._grow(unit_M)
        if self.kind == "bisector":
            if not grew:
                self.basis_MK.copy_(subspace.bisector_update(unit_M, self.basis_MK))
            if int(self.updates) % self.every == 0:
                self.basis_MK.copy_(subspace.orthonormalize(self.basis_MK))
            return
        if self.decay < 1:
            self.buffer_RM.mul_(self.decay**0.5)
        if int(self.rows) == self.buffer_RM.shape[0]:
            self.buffer_RM.copy_(subspace.shrink(self.buffer_RM, self.sketch_rows))
            self.rows.fill_(min(self.sketch_rows - 1, self.buffer_RM.shape[0]))
        self.buffer_RM[int(self.rows)] = unit_M
        self.rows += 1
        if not grew and int(self.updates) % self.refresh == 0:
            self._refresh()

    def _refresh(self) -> None:
        top = subspace.top_directions(self.buffer_RM[: int(self.rows)], self.basis_MK.shape[1])
        self.basis_MK.copy_(top)
        self.rank.fill_(int((top.square().sum(0) > 0.5).sum()))

    def _grow(self, unit_M: Tensor) -> bool:
        """Append the part outside the basis while there is room for it; False where there is nothing to add."""
        if int(self.rank) >= self.basis_MK.shape[1]:
            return False
        direction_M, size = subspace.residual_direction(unit_M, self.basis_MK)
        if float(size) < 1e-3:
            return False
        self.basis_MK[:, int(self.rank)] = direction_M
        self.rank += 1
        return True
