"""Paired statistics of a comparison: intervals, tests, and the smallest difference that could have been seen.

The primary interval is a paired t interval over seeds. A bootstrap crossed over seeds and items stands beside
it as a check, exact McNemar within each seed for accuracies, and Holm's correction over the arms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
MINIMUM_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """A difference with its 95% interval and two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired_t(differences: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's paired interval over seeds; None below three seeds or where they show no spread: none is invented.

    Differences that are identical in every seed say nothing about the next seed: their zero spread is no estimate
    (an arm that does not depend on the seed, or seeds that were one run), and a zero-width interval would be a claim.
    """
    n = len(differences)
    if n < MINIMUM_SEEDS or no_spread(differences):
        return None
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def no_spread(differences: Sequence[float]) -> bool:
    """Whether several differences agree to the last few digits: equal but for rounding."""
    scale = max((abs(d) for d in differences), default=0.0)
    return len(differences) > 1 and max(differences) - min(differences) <= 1e-12 * scale


def crossed_bootstrap(
    differences_SI: Array, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean of ``[seeds, items]`` differences, seeds and items resampled together.

    One seed resamples items only.
    """
    random = np.random.default_rng(seed)
    seeds, items = differences_SI.shape
    means = np.empty(draws)
    for draw in range(draws):
        rows = random.integers(seeds, size=seeds)
        weights = np.bincount(random.integers(items, size=items), minlength=items)
        means[draw] = (differences_SI[rows].mean(0) @ weights) / items
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Interval(float(differences_SI.mean()), float(low), float(high), float(min(1.0, 2 * tail)))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p-value of the discordant pairs (conservative: its size is at most the level)."""
    gained = sum(y and not x for x, y in zip(a, b, strict=True))
    lost = sum(x and not y for x, y in zip(a, b, strict=True))
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values: family-wise error over the arms of a comparison."""
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    adjusted, worst = {}, 0.0
    for rank, (name, p) in enumerate(ordered):
        worst = max(worst, min(1.0, p * (len(ordered) - rank)))
        adjusted[name] = worst
    return adjusted


def detectable_over_seeds(
    differences: Sequence[float], power: float = 0.8, level: float = 0.95
) -> float | None:
    """The difference that this many seeds with this spread would show with ``power``; None without an interval."""
    n = len(differences)
    if n < MINIMUM_SEEDS or no_spread(differences):
        return None
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    return float((stats.t.ppf(0.5 + level / 2, n - 1) + stats.t.ppf(power, n - 1)) * error)


def detectable_over_items(discordance: float, items: int, power: float = 0.8, level: float = 0.95) -> float:
    """The accuracy difference that McNemar's test on ``items`` pairs with this discordance would show."""
    return float((stats.norm.ppf(0.5 + level / 2) + stats.norm.ppf(power)) * math.sqrt(discordance / items))


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """SD / mean; only meaningful beside the SD, since it also falls when the mean rises."""
    mean = float(np.mean(values))
    return float(np.std(values, ddof=1)) / mean if len(values) > 1 and mean != 0 else None


def verdict(
    interval: Interval | None,
    adjusted_p: float | None,
    *,
    higher_is_better: bool,
    differences: Sequence[float] = (),
    unit: str = "",
) -> str:
    """helps / hurts / no detectable difference (at most x), in words; why there is no interval, where there is none."""
    if interval is None:
        if len(differences) >= MINIMUM_SEEDS and not any(differences):
            return "no difference at any seed, and no spread to judge by"
        if len(differences) >= MINIMUM_SEEDS:
            return "no interval: the same difference at every seed, so no spread was observed"
        return "no interval: fewer than three seeds"
    p = interval.p if adjusted_p is None else adjusted_p
    if p < 0.05 and (interval.low > 0 or interval.high < 0):
        better = (interval.mean > 0) == higher_is_better
        return f"{'helps' if better else 'hurts'} by {abs(interval.mean):.3g}{unit}"
    most = max(abs(interval.low), abs(interval.high))
    return f"no detectable difference (at most {most:.3g}{unit})"
