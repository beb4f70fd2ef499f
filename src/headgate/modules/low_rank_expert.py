"""LowRankExpert: the two factors of one LoRA expert at one linear, which train or are frozen.

Legend: I inputs, O outputs, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRankExpert(nn.Module):
    """``down`` [r, I] and ``up`` [r, O]: PEFT's lora_A, and the transpose of its lora_B."""

    down: Tensor
    up: Tensor

    def __init__(self, down_rI: Tensor, up_rO: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down_rI), nn.Parameter(up_rO)

    @classmethod
    def fresh(
        cls, in_features: int, out_features: int, rank: int, stream: torch.Generator | None
    ) -> LowRankExpert:
        """LoRA's start: uniform A as in PEFT (Kaiming, a = sqrt 5), B = 0."""
        bound = 1 / math.sqrt(in_features)
        down_rI = (torch.rand(rank, in_features, generator=stream) * 2 - 1) * bound
        return cls(down_rI, torch.zeros(rank, out_features))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def frozen(self) -> bool:
        return not isinstance(self.down, nn.Parameter)

    def freeze(self, frozen: bool) -> None:
        """Turn parameters into buffers, or back; names and values stay."""
        if frozen == self.frozen:
            return
        for name in ("down", "up"):
            tensor: Tensor = getattr(self, name).detach()
            delattr(self, name)
            if frozen:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    @torch.no_grad()
    def widened(self, stream: torch.Generator | None) -> LowRankExpert:
        """Twice the rank, the same function: A' = [A; random], B' = [B; 0].

        Equation: lora_experts (rank doubling): A' = [A; random], B' = [B, 0], alpha' = 2 alpha
        Proved by: tests/lora_experts/test_bank.py::test_a_wider_expert_is_the_same_function
        """
        more = LowRankExpert.fresh(self.down.shape[1], self.up.shape[1], self.rank, stream).to(self.down)
        return LowRankExpert(torch.cat([self.down, more.down]), torch.cat([self.up, more.up]))
