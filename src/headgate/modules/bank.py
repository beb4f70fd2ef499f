"""LowRankBank: N low-rank experts evaluated together, in two products whatever N is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headgate.ops.gating import Gates
from headgate.ops.low_rank import low_rank_bank, orthonormality
from headgate.ops.reduction import Reduction


class LowRankBank(nn.Module):
    """y = sum_s g_s (x A_s^T) B_s.

    ``down`` [R, I] and ``up`` [R, O] hold every expert's rank rows one after another (R = sum of ranks), so
    that an expert is a contiguous slice of both. In SchemaBank's letters U_s = A_s^T and V_s = B_s.

    Args:
        num_experts: N.
        in_features, out_features: I and O.
        ranks: one rank for all, or one per expert.
        std: both factors are drawn from N(0, std^2). ``up_std`` overrides it for ``up`` (0: LoRA's start).
        generator: source of the initial values.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        ranks: int | Sequence[int],
        *,
        std: float = 0.02,
        up_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.ranks = (ranks,) * num_experts if isinstance(ranks, int) else tuple(ranks)
        if len(self.ranks) != num_experts:
            raise ValueError(f"{len(self.ranks)} ranks for {num_experts} experts: give one rank, or one each")
        total = sum(self.ranks)
        up_std = std if up_std is None else up_std
        self.down = nn.Parameter(torch.randn(total, in_features, generator=generator) * std)
        self.up = nn.Parameter(torch.randn(total, out_features, generator=generator) * up_std)

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    def rows(self, expert: int) -> slice:
        """The expert's rows of ``down`` and ``up``."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def forward(self, x_BTI: Tensor, gates: Gates) -> Tensor:
        return low_rank_bank(x_BTI, self.down, self.up, gates.weight, self.ranks, gates.chosen)

    def orthonormality(self, reduction: Reduction = "mean") -> Tensor:
        """Distance of every expert's output rows from orthonormal ones; needs equal ranks."""
        return orthonormality(self.up.view(self.num_experts, self.ranks[0], -1), reduction)
