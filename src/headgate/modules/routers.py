"""Routers: features -> logits, always computed in fp32 (float64 stays), autocast or not.

A router hands out logits; `headgate.ops.gating` turns them into gates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.ops.gating import at_least_fp32


def exact(kind: str) -> AbstractContextManager[object]:
    """No autocast inside on this kind of device; nothing to leave where there is none."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def linear_of_norm(
    norm: nn.RMSNorm, x_BTI: Tensor, weight_NI: Tensor, bias_N: Tensor | None = None
) -> Tensor:
    """W norm(x) + b without a normed copy of x: (W diag(g)) x / rms(x) + b. A third of a router's time on a CPU.

    With fewer rows than W has, at a decoding step, the copy of x is the smaller one.
    """
    eps = norm.eps if norm.eps is not None else torch.finfo(x_BTI.dtype).eps
    if not torch.is_grad_enabled() and x_BTI.numel() < weight_NI.numel():
        return F.linear(F.rms_norm(x_BTI, x_BTI.shape[-1:], norm.weight, eps), weight_NI, bias_N)
    power_BT1 = torch.linalg.vector_norm(x_BTI, dim=-1, keepdim=True).square() / x_BTI.shape[-1]
    out = F.linear(x_BTI, weight_NI * norm.weight) * torch.rsqrt(power_BT1 + eps)
    return out if bias_N is None else out + bias_N


class LinearRouter(nn.Module):
    """z = W norm(h) [+ b]. ``weight`` is [N, I], drawn from N(0, std^2) by ``generator``; the bias starts at 0."""

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        bias: bool = False,
        norm: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, in_features, generator=generator) * std)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.norm = nn.RMSNorm(in_features, eps=1e-6) if norm else None

    def forward(self, x_BTI: Tensor) -> Tensor:
        with exact(x_BTI.device.type):
            x_BTI = at_least_fp32(x_BTI)
            weight_NI = at_least_fp32(self.weight)
            x_BTI = x_BTI.to(weight_NI.dtype)
            if self.norm is not None:
                return linear_of_norm(self.norm, x_BTI, weight_NI, self.bias)
            return F.linear(x_BTI, weight_NI, self.bias)


class AttributeRouter(LinearRouter):
    """score_s = W_s . [h; a_s] = W_s^h . h + W_s^a . a_s: each schema's learned attributes enter as its bias.

    SchemaBank section 3.3: attributes "concatenated with router input". A W shared by all schemas would add the
    same W^h . h to every score, which the softmax cancels; hence one row per schema.

    Equation: schema_bank (section 3.3): score_s = W_s . [h; a_s]
    Proved by: tests/schema_bank/test_equations.py::test_attributes_enter_as_the_concatenation
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        attribute_dim: int = 32,
        *,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, num_experts, std=std, generator=generator)
        self.attribute_weight = nn.Parameter(
            torch.randn(num_experts, attribute_dim, generator=generator) * std
        )
        self.attributes = nn.Parameter(torch.randn(num_experts, attribute_dim, generator=generator) * std)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return super().forward(x_BTI) + (self.attribute_weight * self.attributes).sum(-1)


class MLPRouter(nn.Module):
    """z = W_n gelu(... gelu(W_1 norm(h))) with an RMSNorm in front; ``init_bias`` sets the first gates' odds.

    The last layer starts at zero weight plus ``init_bias``: every input begins with the same logits.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_experts: int,
        *,
        init_bias: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(in_features, eps=1e-6)
        sizes = [in_features, *hidden, num_experts]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        for layer, size in zip(self.layers, sizes[:-1], strict=True):
            assert isinstance(layer, nn.Linear)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / size**0.5)
            nn.init.zeros_(layer.bias)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, init_bias)

    def forward(self, x_BTI: Tensor) -> Tensor:
        with exact(x_BTI.device.type):
            first, *later = self.layers
            assert isinstance(first, nn.Linear)
            x_BTI = at_least_fp32(x_BTI).to(first.weight.dtype)
            out = linear_of_norm(self.norm, x_BTI, first.weight, first.bias)
            for layer in later:
                out = layer(F.gelu(out))
            return out
