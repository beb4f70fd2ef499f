"""Patch: what a block that does not run leaves behind, a low-rank map of the normed stream instead of nothing.

    P(x) = up gelu(down norm(x)),   y = g F(x) + (1 - g) (x + P(x))

It costs 2 H r multiply-adds a token: under 2% of a Llama-shaped block for r up to H / 10. ``up`` starts at 0, so a closed
block starts as the identity; the norm has no scale of its own, which ``down`` would absorb.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patch(nn.Module):
    """One unit's patch. ``down`` ``[r, H]`` from N(0, 1 / H) by ``generator``, ``up`` ``[H, r]`` zero."""

    def __init__(self, hidden_size: int, rank: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        down = torch.randn(rank, hidden_size, generator=generator) / math.sqrt(hidden_size)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(hidden_size, rank))

    def forward(self, x: Tensor) -> Tensor:
        """P(x) for tokens in any shape ``[..., H]``, in their dtype.

        Equation: layer_routing (patch): P(x) = up gelu(down norm(x)); y = g F(x) + (1 - g) (x + P(x))
        Proved by: tests/layer_routing/test_patch.py::test_a_closed_block_is_x_plus_patch
        """
        narrow = F.gelu(F.linear(F.rms_norm(x, x.shape[-1:]), self.down.to(x.dtype)))
        return F.linear(narrow, self.up.to(narrow.dtype)).to(x.dtype)
