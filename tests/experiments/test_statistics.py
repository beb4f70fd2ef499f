"""Statistics: intervals that cover, tests that keep their size, corrections that only ever raise a p-value."""

from __future__ import annotations

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


def test_the_spread_is_that_of_a_sample_in_units_of_its_mean() -> None:
    assert statistics.coefficient_of_variation([1.0, 2.0, 3.0]) == 0.5
    assert statistics.coefficient_of_variation([1.0, 3.0]) == pytest.approx(2**0.5 / 2)
    assert statistics.coefficient_of_variation([1.0]) is statistics.coefficient_of_variation([-1, 1]) is None


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
def test_holm_is_the_largest_of_the_step_down_products(p_values: dict[str, float]) -> None:
    """adjusted(i) = max over j <= i of min(1, (m - j + 1) p(j)), by a second way of writing it."""
    adjusted, ordered = statistics.holm(p_values), sorted(p_values.values())
    for name, p in p_values.items():
        products = [(len(ordered) - j) * q for j, q in enumerate(ordered) if q <= p]
        # equal values share the largest product that any of them has: the one of the first in order
        assert adjusted[name] == pytest.approx(min(1.0, max(products)))


def test_holm_is_stronger_than_bonferroni() -> None:
    assert statistics.holm({"a": 0.01, "b": 0.02, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.04, "c": 0.04}
    )


def test_identical_differences_have_no_interval_and_no_p() -> None:
    """No spread was observed: a zero-width interval and p = 0 would be a claim that nobody measured."""
    for difference in (0.25, 0.1, -3e-7):
        same = [difference] * 5
        assert statistics.paired_t(same) is None and statistics.detectable_over_seeds(same) is None
        words = statistics.verdict(None, None, higher_is_better=True, differences=same)
        assert words == "no interval: the same difference at every seed, so no spread was observed"
    assert "no difference at any seed" in statistics.verdict(
        None, None, higher_is_better=True, differences=[0.0] * 3
    )
    assert statistics.paired_t([0.1, 0.1, 0.1 + 1e-6]) is not None
    # 0.3 - 0.2 and 0.2 - 0.1 differ in the last bit: still no spread
    assert statistics.paired_t([0.3 - 0.2, 0.2 - 0.1, 0.1]) is None


def test_crossed_bootstrap_resamples_seeds_and_items() -> None:
    """Spread over seeds alone, and over items alone, each widens the interval as its standard error says."""
    random = np.random.default_rng(1)
    seeds, items = 6, 400
    over_seeds = np.repeat(random.standard_normal((seeds, 1)), items, axis=1)
    over_items = np.repeat(random.standard_normal((1, items)), seeds, axis=0)
    for differences, error in (
        (over_seeds, over_seeds[:, 0].std() / seeds**0.5),
        (over_items, over_items[0].std() / items**0.5),
    ):
        interval = statistics.crossed_bootstrap(differences, draws=3000)
        assert interval.mean == pytest.approx(differences.mean())
        assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize("power", [0.8, 0.9])
def test_a_detectable_difference_is_detected_that_often(power: float) -> None:
    """Simulated: with the true difference at ``detectable_over_seeds`` of the true spread, ``power`` of tests reject."""
    random, seeds, spread = np.random.default_rng(0), 6, 1.0
    template = np.array([-1.0, 1.0] * (seeds // 2)) * spread / np.std([-1.0, 1.0] * (seeds // 2), ddof=1)
    difference = statistics.detectable_over_seeds(list(template), power=power)
    assert difference is not None
    draws = random.standard_normal((20_000, seeds)) * spread + difference
    t = draws.mean(1) / (draws.std(1, ddof=1) / seeds**0.5)
    rejected = float((t > stats.t.ppf(0.975, seeds - 1)).mean())
    assert rejected == pytest.approx(power, abs=0.06)
    assert statistics.detectable_over_seeds(list(template), power=0.9) > statistics.detectable_over_seeds(
        list(template), power=0.8
    )


def test_items_that_could_have_shown_a_difference() -> None:
    """(z(.975) + z(power)) sqrt(discordance / n): 1.96 + 0.84 by hand."""
    assert statistics.detectable_over_items(0.25, 100) == pytest.approx(
        (1.959964 + 0.841621) * 0.05, rel=1e-5
    )
    assert statistics.detectable_over_items(0.25, 100, power=0.5) == pytest.approx(1.959964 * 0.05, rel=1e-5)


def test_a_verdict_listens_to_the_adjusted_p() -> None:
    interval = statistics.paired_t([0.10, 0.12, 0.11])
    assert interval is not None and interval.p < 0.05
    assert statistics.verdict(interval, 0.04, higher_is_better=True).startswith("helps")
    assert statistics.verdict(interval, 0.06, higher_is_better=True).startswith("no detectable")


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
