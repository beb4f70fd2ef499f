"""Figures of the log as they are for all ranks together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from headgate.training import processes


def over_ranks(figures: Mapping[str, object]) -> dict[str, object]:
    """Means over ranks of the numbers in ``figures``; the largest ``memory_peak``; rank 0's of anything else.

    Every rank averages over equally many micro-batches, so that the mean of the means is that of all. Collective.
    """
    ranks = processes.gather(dict(figures))
    if len(ranks) == 1:
        return ranks[0]
    return {name: _joined(name, [rank[name] for rank in ranks if name in rank]) for name in ranks[0]}


def _joined(name: str, values: Sequence[object]) -> object:
    if name == "memory_peak":
        return max(value for value in values if isinstance(value, (int, float)))
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) == len(values):
        return math.fsum(numbers) / len(numbers)
    lists = [value for value in values if isinstance(value, list)]
    alike = len(lists) == len(values) and len({len(value) for value in lists}) == 1
    if alike and all(isinstance(item, float) for value in lists for item in value):
        return [math.fsum(items) / len(lists) for items in zip(*lists, strict=True)]
    return values[0]


def telemetry_of_all(states: Sequence[Mapping[str, Any]], world: int) -> dict[str, Any]:
    """One of ``world`` ranks' share of the unlogged telemetry that other ranks saved (see ``Telemetry.state``)."""
    if len(states) == 1 and world == 1:
        return dict(states[0])
    sums: dict[str, list[Any]] = {}
    for state in states:
        for name, (total, count) in state.get("sums", {}).items():
            before = sums.setdefault(name, [0.0, 0])
            before[0] += total if isinstance(total, float) else total["fp32"]
            before[1] += count
    shares = {name: [total / world, max(1, count // world)] for name, (total, count) in sums.items()}
    return {"sums": shares, "latest": dict(states[0].get("latest", {}))}
