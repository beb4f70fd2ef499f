"""Do the intervals cover what they claim, and do the tests keep their size? By simulation, at 3, 5 and 10 seeds.

Differences of two arms are drawn with seeds and items both random. ``normal``: seed effects are normal. ``skewed arms``:
each arm's seed effect is exponential, so their difference is heavy-tailed but symmetric. ``heavy tails``: Student's t
with 3 degrees of freedom. ``accuracy``: right or wrong on 200 items. ``skewed difference``: one arm alone fails now and
then (an exponential difference, far above the items' noise), the case in which no interval from a handful of seeds is safe; no target is set.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from headgate.experiments import statistics
from headgate.experiments.benchmarks.frame import Report, Say, at_least, at_most

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Array]
SEEDS, ITEMS, EFFECT = (3, 5, 10), 200, 0.02


def _with_items(random: np.random.Generator, seed_effects: Array) -> Array:
    return EFFECT + 0.03 * seed_effects + 0.4 * random.standard_normal((len(seed_effects), ITEMS)).mean(1)


def _accuracy(random: np.random.Generator, n: int) -> Array:
    difficulty = random.beta(2, 2, size=ITEMS)
    shift = EFFECT + 0.02 * random.standard_normal((n, 1))
    a = random.random((n, ITEMS)) < np.clip(difficulty, 0, 1 - EFFECT)
    b = random.random((n, ITEMS)) < np.clip(np.clip(difficulty, 0, 1 - EFFECT) + shift, 0, 1)
    found: Array = (b.astype(float) - a).mean(1)
    return found


SITUATIONS: dict[str, Draw] = {
    "normal": lambda r, n: _with_items(r, r.standard_normal(n)),
    "skewed arms": lambda r, n: _with_items(r, r.exponential(size=n) - r.exponential(size=n)),
    "heavy tails": lambda r, n: _with_items(r, r.standard_t(3, size=n)),
    "accuracy": _accuracy,
    "skewed difference": lambda r, n: _with_items(r, 10 * (r.exponential(size=n) - 1)),
}
UNCHECKED = ("skewed difference",)


def coverage(draw: Draw, seeds: int, repetitions: int, seed: int = 0) -> dict[str, float]:
    """Share of intervals that hold the truth: the paired t interval, and a BCa bootstrap over the same seeds."""
    random = np.random.default_rng(seed)
    truth = float(np.mean([draw(random, 50).mean() for _ in range(2000)])) if draw is _accuracy else EFFECT
    inside = {"t": 0, "bca": 0}
    tried = 0
    for turn in range(repetitions):
        differences = draw(random, seeds)
        interval = statistics.paired_t(differences.tolist())
        assert interval is not None
        inside["t"] += interval.low <= truth <= interval.high
        if turn % 20 == 0:  # slow, and only there to show why it is not the primary interval
            tried += 1
            found = stats.bootstrap((differences,), np.mean, n_resamples=400, method="BCa", rng=random)
            inside["bca"] += found.confidence_interval.low <= truth <= found.confidence_interval.high
    return {"t": inside["t"] / repetitions, "bca": inside["bca"] / tried}


def mcnemar_size(repetitions: int, seed: int = 0) -> float:
    """Share of exact McNemar tests below .05 where two arms are equally good on items of unequal difficulty."""
    random = np.random.default_rng(seed)
    rejected = 0
    for _ in range(repetitions):
        p = random.beta(2, 2, size=ITEMS)
        a, b = random.random(ITEMS) < p, random.random(ITEMS) < p
        rejected += statistics.mcnemar(list(a), list(b)) < 0.05
    return rejected / repetitions


def run(*, quick: bool, say: Say) -> Report:
    """Coverage by situation and number of seeds; McNemar's size."""
    report, repetitions = Report("statistics"), 1000 if quick else 20_000
    for name, draw in SITUATIONS.items():
        for seeds in SEEDS:
            found = coverage(draw, seeds, repetitions)
            report.arms[f"{name}, {seeds} seeds"] = {**found, "repetitions": repetitions}
            say(f"{name}, {seeds} seeds: paired t {found['t']:.3f}, BCa over seeds {found['bca']:.3f}")
            if name not in UNCHECKED:
                slack = 2 * (0.05 * 0.95 / repetitions) ** 0.5 if quick else 0.0
                report.checks.append(
                    at_least(f"coverage of the t interval, {name}, {seeds} seeds", found["t"], 0.93 - slack)
                )
    size = mcnemar_size(repetitions)
    report.arms["McNemar"] = {"size": size, "repetitions": repetitions}
    say(f"McNemar's size at .05: {size:.4f}")
    report.checks.append(at_most("size of McNemar's test at .05", size, 0.05))
    return report
