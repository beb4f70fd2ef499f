"""Depth on held-out data: utilization and adaptivity, depth of every token."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headgate.errors import DataError
from headgate.methods.layer_routing.method import LayerRouting
from headgate.models.anatomy import Batch
from headgate.ops.depth import adaptivity
from headgate.ops.routing_losses import flat_mean


@dataclass(frozen=True)
class Depth:
    """Over real tokens: ``utilization`` of all blocks, open rate per gate, I(gate; token) per gate in nats."""

    utilization: float
    per_gate: list[float]
    adaptivity: list[float]
    tokens: int


def measure(method: LayerRouting, batches: Iterable[Batch]) -> Depth:
    """Depth that the attached method executes at inference on ``batches``."""
    tokens, used, opened = 0, 0.0, []
    for route in method.execution.routes(batches):
        valid = route.context.valid
        gates = (route.weight != 0).float().expand(*valid.shape, -1)
        opened.append(gates[valid].cpu())
        count = int(valid.sum())
        tokens += count
        used += float(method.shares.used(route)) * count
    if not tokens:
        raise DataError("no real token in the batches: nothing to measure")
    every = torch.cat(opened).unsqueeze(0)
    real = torch.ones(every.shape[:2], dtype=torch.bool)
    rates, spread = flat_mean(every, real), adaptivity(every, real)
    return Depth(used / tokens, rates.tolist(), spread.tolist(), tokens)


def token_depth(method: LayerRouting, batch: Batch) -> Tensor:
    """Share of all blocks that ran for every token, ``[B, T]``; NaN on padding."""
    (route,) = method.execution.routes([batch])
    valid = route.context.valid
    gates = (route.weight != 0).float().expand(*valid.shape, -1)
    depth = method.shares.always + (gates * method.shares.per_gate.to(gates)).sum(-1)
    return torch.where(valid, depth, torch.nan)


def heat_map(tokens: list[str], depth: list[float]) -> str:
    """A self-contained HTML page: the text, every token on a ground as dark as it went deep."""
    spans = [
        f'<span style="background:rgba(0,114,178,{value:.2f})" title="{value:.0%} of the blocks">{html.escape(token)}</span>'
        for token, value in zip(tokens, depth, strict=True)
    ]
    body = "".join(spans)
    return f'<!doctype html><meta charset="utf-8"><title>Depth per token</title><pre style="white-space:pre-wrap;line-height:1.6">{body}</pre>\n'
