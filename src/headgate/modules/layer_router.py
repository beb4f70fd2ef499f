"""LayerRouter: one network decides the whole depth, RMSNorm, H -> H/2 -> H/4 -> gates, in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headgate.modules.routers import MLPRouter


class LayerRouter(MLPRouter):
    """Logits of all gates from one hidden state: P(open) = sigmoid(z), every input starting at ``init_keep``.

    ``trunk_gradient``: whether the gradient goes on into the blocks below, which then also learn to route.
    ``bound``: logits are bound tanh(z / bound), so that a gate that is sure can still change its mind; None: as they are.
    Raises ValueError for an ``init_keep`` that no bounded logit reaches.

    Equation: layer_routing (bounded logits): z <- b tanh(z / b)
    Proved by: tests/layer_routing/test_start.py::test_bounded_logits_stay_within_and_start_where_they_should
    """

    def __init__(
        self,
        hidden_size: int,
        num_gates: int,
        *,
        init_keep: float = 0.9,
        trunk_gradient: bool = False,
        bound: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        bias = unbounded(math.log(init_keep / (1 - init_keep)), bound)
        sizes = [max(hidden_size // 2, 1), max(hidden_size // 4, 1)]
        super().__init__(hidden_size, sizes, num_gates, init_bias=bias, generator=generator)
        self.trunk_gradient, self.bound = trunk_gradient, bound

    def forward(self, x_BTI: Tensor) -> Tensor:
        logits_BTG = super().forward(x_BTI if self.trunk_gradient else x_BTI.detach())
        return logits_BTG if self.bound is None else self.bound * torch.tanh(logits_BTG / self.bound)

    @torch.no_grad()
    def start_at(self, mask_G: Tensor, logit: float) -> None:
        """Every input gets +``logit`` where the mask is open and -``logit`` where it is closed; deeper layers stay."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias.copy_((2 * mask_G.to(last.bias) - 1) * unbounded(logit, self.bound))


def unbounded(logit: float, bound: float | None) -> float:
    """The z whose bound tanh(z / bound) is ``logit``. Raises ValueError for a logit that is not below the bound."""
    if bound is None:
        return logit
    if abs(logit) >= bound:
        raise ValueError(f"a logit of {logit:.3g} is not below the bound {bound:g}")
    return bound * math.atanh(logit / bound)
