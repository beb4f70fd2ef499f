"""Statistics: intervals that cover, tests that keep their size, corrections that only ever raise a p-value."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from headgate.experiments import statistics
from headgate.experiments.benchmarks.statistics import (
    SEEDS,
    SITUATIONS,
    UNCHECKED,
    coverage,
    mcnemar_size,
)


def test_paired_t_is_scipys_one_sample_t() -> None:
    differences = [0.3, -0.1, 0.25, 0.4, 0.05]
    found = statistics.paired_t(differences)
    reference = stats.ttest_1samp(differences, 0.0)
    assert found is not None
    assert found.p == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))


def test_fewer_than_three_seeds_have_no_interval() -> None:
    assert statistics.paired_t([0.1, 0.2]) is None
    assert statistics.detectable_over_seeds([0.1, 0.2]) is None
    assert statistics.verdict(None, None, higher_is_better=True).startswith("no interval")


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_primary_interval_covers(seeds: int) -> None:
    assert coverage(SITUATIONS["normal"], seeds, 1500)["t"] >= 0.93


def test_mcnemar_keeps_its_size() -> None:
    assert mcnemar_size(1500) <= 0.05 + 2 * (0.05 * 0.95 / 1500) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("situation", [name for name in SITUATIONS if name not in UNCHECKED])
def test_coverage_with_many_repetitions(situation: str, seeds: int) -> None:
    assert coverage(SITUATIONS[situation], seeds, 20_000, seed=1)["t"] >= 0.93


@pytest.mark.slow
def test_mcnemars_size_with_many_repetitions() -> None:
    assert mcnemar_size(20_000, seed=1) <= 0.05


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_laws(p_values: dict[str, float]) -> None:
    adjusted = statistics.holm(p_values)
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1.0, p * len(p_values)) + 1e-12 or adjusted[name] <= 1
        assert adjusted[name] >= p
    order = sorted(p_values, key=lambda name: p_values[name])
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(order))


def test_crossed_bootstrap_brackets_the_mean() -> None:
    random = np.random.default_rng(1)
    differences = random.standard_normal((5, 80)) + 0.3
    interval = statistics.crossed_bootstrap(differences, draws=500)
    assert interval.low < interval.mean < interval.high
    assert interval.mean == pytest.approx(differences.mean())


@pytest.mark.parametrize(
    ("mean", "half", "p", "higher", "words"),
    [
        (0.1, 0.02, 0.001, True, "helps by 0.1"),
        (0.1, 0.02, 0.001, False, "hurts by 0.1"),
        (-0.1, 0.02, 0.001, False, "helps by 0.1"),
        (0.01, 0.05, 0.6, True, "no detectable difference (at most 0.06)"),
        (0.1, 0.02, 0.2, True, "no detectable difference (at most 0.12)"),
    ],
)
def test_verdicts(mean: float, half: float, p: float, higher: bool, words: str) -> None:
    interval = statistics.Interval(mean, mean - half, mean + half, p)
    assert statistics.verdict(interval, p, higher_is_better=higher) == words
