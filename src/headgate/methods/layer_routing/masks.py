"""Fixed masks of one depth: all of them, one drawn at random, and the one that costs least loss.

A search is as good as the weights that it asks. Asked of weights that never ran without a block, it ranks masks by how well
they are borne; asked of weights that trained under masks drawn at random, one a batch, by what they are worth once trained
(one-shot search with uniform sampling: Guo et al. 2020, section 3.2).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOST_MASKS = 64
"""Up to so many masks are all tried; where there are more, a beam goes block by block."""
BEAM = 4
Loss = Callable[[Tensor], float]


def mask_without(shut: Sequence[int], places: int, units: int) -> Tensor:
    """Gates ``[places * units]`` with these places shut."""
    gates = torch.ones(places, units)
    gates[list(shut)] = 0.0
    return gates.flatten()


def masks_of(places: int, closed: int, units: int) -> list[Tensor]:
    """Gates ``[places * units]`` of every mask with ``closed`` blocks shut, or of 64 drawn ones where there are more."""
    if math.comb(places, closed) <= MOST_MASKS:
        shut: Sequence[tuple[int, ...]] = list(itertools.combinations(range(places), closed))
    else:
        stream, sample = random.Random(0), set[tuple[int, ...]]()
        while len(sample) < MOST_MASKS:
            sample.add(tuple(sorted(stream.sample(range(places), closed))))
        shut = sorted(sample)
    return [mask_without(blocks, places, units) for blocks in shut]


def drawn_mask(places: int, closed: int, units: int, stream: torch.Generator) -> Tensor:
    """Gates ``[places * units]`` of a mask with ``closed`` blocks shut, each as likely as any other."""
    return mask_without(torch.randperm(places, generator=stream)[:closed].tolist(), places, units)


def greedy_mask(loss: Loss, places: int, closed: int, units: int) -> Tensor:
    """Gates ``[places * units]`` with ``closed`` blocks shut, one after the other where it costs least loss."""
    return _beam(loss, places, closed, units, width=1)


def best_mask(loss: Loss, places: int, closed: int, units: int) -> Tensor:
    """Gates ``[places * units]`` of the least loss: of all masks where they are at most 64, else of a beam of four."""
    if math.comb(places, closed) <= MOST_MASKS:
        return min(masks_of(places, closed, units), key=loss)
    return _beam(loss, places, closed, units, BEAM)


def _beam(loss: Loss, places: int, closed: int, units: int, width: int) -> Tensor:
    kept: list[tuple[int, ...]] = [()]
    for _ in range(closed):
        grown = {
            tuple(sorted((*shut, place))) for shut in kept for place in range(places) if place not in shut
        }
        cost = {shut: loss(mask_without(shut, places, units)) for shut in sorted(grown)}
        kept = sorted(cost, key=cost.__getitem__)[:width]
    return mask_without(kept[0], places, units)
