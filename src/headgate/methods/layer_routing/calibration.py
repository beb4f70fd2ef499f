"""What is set from data: the threshold at which a router holds a depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.route import Route, entries
from headgate.methods.layer_routing.shares import Shares
from headgate.methods.step import real_tokens
from headgate.models.anatomy import Batch
from headgate.ops.depth import threshold_for

CALIBRATION_TOKENS = 16_384


def first_tokens(batches: Iterable[Batch], tokens: int) -> Iterator[Batch]:
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
