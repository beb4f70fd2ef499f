"""What is set from data: the threshold at which a router holds a depth, and the mask that costs least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.policies import Route, entries
from headgate.methods.layer_routing.shares import Shares
from headgate.methods.step import real_tokens
from headgate.ops.depth import threshold_for

CALIBRATION_TOKENS = 16_384
SEARCH_BATCHES = 2


def first_tokens(batches: Iterable[Mapping[str, Any]], tokens: int) -> Iterator[Mapping[str, Any]]:
    """Batches until they hold ``tokens`` real ones."""
    total = 0
    for batch in batches:
        yield batch
        total += int(real_tokens(batch).sum())
        if total >= tokens:
            return


def threshold_at(
    target: float, routes: Iterable[Route], config: LayerRoutingConfig, shares: Shares
) -> Tensor | None:
    """The threshold at which ``target`` of all blocks is open on real tokens; None: no gate is free."""
    logits, worths, wanted = [], [], torch.zeros(())
    for route in routes:
        logit, worth, counted, always = entries(route, config, shares.per_gate)
        logits.append(logit[counted])
        worths.append(worth[counted])
        real = route.context.valid.sum()
        wanted = wanted + ((target - shares.always) * real - always).cpu()
    if not sum(map(len, logits)):
        return None
    every = torch.cat(logits)
    return threshold_for(every, torch.cat(worths), wanted.to(every), torch.ones_like(every, dtype=torch.bool))


def cheapest_mask(loss: Callable[[Tensor], float], places: int, closed: int, units: int) -> Tensor:
    """Gates ``[places * units]`` with ``closed`` blocks shut, one after the other where it costs least loss."""

    def mask(shut: list[int]) -> Tensor:
        gates = torch.ones(places, units)
        gates[shut] = 0.0
        return gates.flatten()

    shut: list[int] = []
    for _ in range(closed):
        free = [place for place in range(places) if place not in shut]
        shut.append(min(free, key=lambda place: loss(mask([*shut, place]))))
    return mask(shut)
