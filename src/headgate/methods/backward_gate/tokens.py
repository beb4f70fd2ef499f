"""The token-level gate: every forward runs, and only the head's backward is thinned out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.fused_head import HeadChunk


class TokenDraw(FixedPrecision):
    """Horvitz-Thompson weights: token t is kept with p_t and then counts 1 / p_t; the gradient stays unbiased.

    ``norm``: ``p_t = min(1, a s_t / mean s)`` with ``s_t = ||h_t|| ||e_t||``, the norm of the token's head gradient.
    ``random``: ``p_t = a``. The blocks below still receive a full-length backward, so only head work is saved.
    """

    stays_on_cpu = frozenset({"count"})
    mean: Tensor
    count: Tensor

    def __init__(self, kind: Literal["random", "norm"], share: float) -> None:
        super().__init__()
        self.kind, self.share = kind, share
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self._stream: torch.Generator | None = None

    def begin(self, stream: torch.Generator) -> None:
        """Draws of the coming micro-batch come from ``stream``."""
        self._stream = stream

    @torch.no_grad()
    def weights(self, chunk: HeadChunk) -> Tensor:
        """``[C]`` weights, 0 for tokens left out."""
        draw_C = torch.rand(chunk.loss_C.shape[0], generator=self._stream).to(chunk.loss_C.device)
        if self.kind == "random":
            p_C = torch.full_like(draw_C, self.share)
        else:
            size_C = torch.linalg.vector_norm(chunk.hidden_CH.float(), dim=-1)
            size_C = size_C * torch.linalg.vector_norm(chunk.error_CV, dim=-1)
            rate = max(0.01, 1 / (int(self.count) + 1))
            self.mean += rate * (size_C.mean() - self.mean)
            self.count += 1
            p_C = (self.share * size_C / self.mean.clamp(min=1e-12)).clamp(1e-3, 1)
        return torch.where(draw_C < p_C, 1 / p_C, torch.zeros_like(p_C))

    @torch.no_grad()
    def pool(self, sum_across_ranks: Callable[[Tensor], Tensor]) -> None:
        """After a micro-batch: every rank goes on with the mean of all ranks' running means."""
        total = sum_across_ranks(torch.stack([self.mean, torch.ones_like(self.mean)]))
        self.mean.copy_(total[0] / total[1])
