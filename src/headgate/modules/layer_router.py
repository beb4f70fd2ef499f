"""LayerRouter: one network decides the whole depth, RMSNorm, H -> H/2 -> H/4 -> gates, in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headgate.modules.routers import MLPRouter


class LayerRouter(MLPRouter):
    """Logits of all gates from one hidden state: P(open) = sigmoid(z), every input starting at ``init_keep``.

    ``trunk_gradient``: whether the gradient goes on into the blocks below, which then also learn to route.
    """

    def __init__(
        self,
        hidden_size: int,
        num_gates: int,
        *,
        init_keep: float = 0.9,
        trunk_gradient: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        bias = math.log(init_keep / (1 - init_keep))
        sizes = [max(hidden_size // 2, 1), max(hidden_size // 4, 1)]
        super().__init__(hidden_size, sizes, num_gates, init_bias=bias, generator=generator)
        self.trunk_gradient = trunk_gradient

    def forward(self, x_BTI: Tensor) -> Tensor:
        return super().forward(x_BTI if self.trunk_gradient else x_BTI.detach())
