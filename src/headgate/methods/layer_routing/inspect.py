"""Depth on held-out data: calibration of the threshold, utilization and adaptivity, depth of every token."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headgate.errors import ConfigError, DataError
from headgate.methods.layer_routing.method import LayerRouting
from headgate.methods.layer_routing.policies import Route, entries
from headgate.models.block_parts import evaluating
from headgate.ops.depth import adaptivity, threshold_for
from headgate.ops.routing_losses import flat_mean

CALIBRATION_TOKENS = 16_384
INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Depth:
    """Over real tokens: ``utilization`` of all blocks, open rate per gate, I(gate; token) per gate in nats."""

    utilization: float
    per_gate: list[float]
    adaptivity: list[float]
    tokens: int


@contextmanager
def _inference(method: LayerRouting) -> Iterator[Any]:
    assert method._anatomy is not None, "attach the method first"
    model = method._anatomy.model
    with evaluating(model), torch.no_grad():
        yield model


def _routes(method: LayerRouting, batches: Iterable[Mapping[str, Any]]) -> Iterator[Route]:
    with _inference(method) as model:
        for batch in batches:
            model(**{k: batch[k] for k in INPUTS if k in batch}, use_cache=False)
            assert method.route is not None
            yield method.route


def measure(method: LayerRouting, batches: Iterable[Mapping[str, Any]]) -> Depth:
    """Depth that the attached method executes at inference on ``batches``."""
    tokens, used = 0, 0.0
    rates, spread = torch.zeros(len(method.share)), torch.zeros(len(method.share))
    opened = []
    for route in _routes(method, batches):
        valid = route.context.valid
        gates = (route.weight != 0).float().expand(*valid.shape, -1)
        opened.append(gates[valid].cpu())
        count = int(valid.sum())
        tokens += count
        used += float(method.used(route)) * count
    if not tokens:
        raise DataError("no real token in the batches: nothing to measure")
    every = torch.cat(opened).unsqueeze(0)
    real = torch.ones(every.shape[:2], dtype=torch.bool)
    rates, spread = flat_mean(every, real), adaptivity(every, real)
    return Depth(used / tokens, rates.tolist(), spread.tolist(), tokens)


def fit_threshold(
    method: LayerRouting,
    batches: Iterable[Mapping[str, Any]],
    target: float | None = None,
    tokens: int = CALIBRATION_TOKENS,
) -> None:
    """Set the inference threshold so that utilization is ``target`` (the config's) on the first ``tokens`` real ones.

    Nothing happens where no threshold decides: a policy without a router, routing removed, no token that is free.
    """
    if method.router is None or method.routing == "removed":
        return
    target = method.config.target_utilization if target is None else target
    logits, worths, wanted, seen = [], [], torch.zeros(()), 0
    for route in _routes(method, batches):
        logit, worth, always = entries(route, method.config.policy, method.units, method.share)
        logits.append(logit)
        worths.append(worth)
        real = route.context.valid.sum()
        wanted = wanted + ((target - method.always) * real - always).cpu()
        seen += int(real)
        if seen >= tokens:
            break
    if sum(map(len, logits)):
        found = threshold_for(torch.cat(logits), torch.cat(worths), wanted.to(logits[0]))
        method.threshold.copy_(found)


def calibrate(
    method: LayerRouting, batches: Iterable[Mapping[str, Any]], target: float | None = None
) -> Depth:
    """Set the threshold on all of ``batches`` (see fit_threshold), and the depth that they then run at.

    Raises ConfigError for a policy without a threshold.
    """
    if method.router is None:
        raise ConfigError(f"policy {method.config.policy!r} has no threshold to calibrate")
    batches = list(batches)
    fit_threshold(method, batches, target, sys.maxsize)
    return measure(method, batches)


def fit_static(method: LayerRouting, batches: Iterable[Mapping[str, Any]], count: int, used: int = 2) -> None:
    """Skip, one after the other, the block whose absence costs least loss on the first ``used`` batches."""
    held = [batch for batch, _ in zip(batches, range(used), strict=False)]
    units = method.units
    with _inference(method) as model:

        def loss(places: list[int]) -> float:
            method.fixed.fill_(1.0)
            for place in places:
                method.fixed[place * units : (place + 1) * units] = 0.0
            inputs = ({k: b[k] for k in (*INPUTS, "labels") if k in b} for b in held)
            return sum(float(model(**batch, use_cache=False).loss) for batch in inputs)

        skipped: list[int] = []
        for _ in range(count):
            free = [place for place in range(len(method.blocks)) if place not in skipped]
            skipped.append(min(free, key=lambda place: loss([*skipped, place])))
        loss(skipped)


def token_depth(method: LayerRouting, batch: Mapping[str, Any]) -> Tensor:
    """Share of all blocks that ran for every token, ``[B, T]``; NaN on padding."""
    (route,) = _routes(method, [batch])
    valid = route.context.valid
    gates = (route.weight != 0).float().expand(*valid.shape, -1)
    depth = method.always + (gates * method.share.to(gates)).sum(-1)
    return torch.where(valid, depth, torch.nan)


def heat_map(tokens: list[str], depth: list[float]) -> str:
    """A self-contained HTML page: the text, every token on a ground as dark as it went deep."""
    spans = [
        f'<span style="background:rgba(0,114,178,{value:.2f})" title="{value:.0%} of the blocks">{html.escape(token)}</span>'
        for token, value in zip(tokens, depth, strict=True)
    ]
    body = "".join(spans)
    return f'<!doctype html><meta charset="utf-8"><title>Depth per token</title><pre style="white-space:pre-wrap;line-height:1.6">{body}</pre>\n'
