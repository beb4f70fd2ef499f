"""Ranks are uniform, lengths do not matter, thresholds hold their target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.experiments.benchmarks.controller import KINDS, TARGETS, gated
from headgate.ops import calibration, control


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(-5, 5))
def test_rank_is_monotone_symmetric_and_inside_the_unit_interval(values, value):
    window = torch.tensor(values, dtype=torch.float64)
    rank = calibration.windowed_rank(torch.tensor(value, dtype=torch.float64), window, len(values))
    assert 0 < rank < 1
    mirrored = calibration.windowed_rank(torch.tensor(-value, dtype=torch.float64), -window, len(values))
    torch.testing.assert_close(rank + mirrored, torch.ones((), dtype=rank.dtype))
    higher = calibration.windowed_rank(torch.tensor(value + 1, dtype=torch.float64), window, len(values))
    assert higher >= rank


def test_a_constant_stream_ranks_in_the_middle():
    window = torch.full((9,), 0.3)
    assert calibration.windowed_rank(torch.tensor(0.3), window, 9) == 0.5
    assert calibration.windowed_rank(torch.tensor(0.3), window, 0) == 0.5


def test_length_correction_removes_the_dependence_on_tokens():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 2000, (1500,), generator=g).double().log()
    novelty = 0.9 - 0.05 * tokens + 0.02 * torch.randn(1500, generator=g).double()
    moments, corrected = torch.zeros(4, dtype=torch.float64), []
    for i, (x, y) in enumerate(zip(tokens, novelty, strict=True)):
        corrected.append(calibration.length_corrected(y, x, moments))
        moments = calibration.regression_moments(moments, x, y, i, 0.01)
    late = torch.stack([torch.stack(corrected[300:]), tokens[300:]])
    raw = torch.stack([novelty[300:], tokens[300:]])
    assert abs(float(torch.corrcoef(raw)[0, 1])) > 0.9
    assert abs(float(torch.corrcoef(late)[0, 1])) < 0.15


def test_length_correction_does_nothing_where_lengths_are_equal():
    moments = torch.zeros(4, dtype=torch.float64)
    x = torch.tensor(5.0, dtype=torch.float64)
    for i in range(50):
        moments = calibration.regression_moments(moments, x, torch.rand((), dtype=torch.float64), i, 0.01)
    y = torch.tensor(0.42, dtype=torch.float64)
    torch.testing.assert_close(calibration.length_corrected(y, x, moments), y)


def test_centering_uncovers_what_a_shared_direction_hides():
    g = torch.Generator().manual_seed(0)
    shared = torch.zeros(32)
    shared[0] = 1
    z = torch.nn.functional.normalize(shared + 0.1 * torch.randn(200, 32, generator=g), dim=1)
    mean = torch.zeros(32)
    for i, row in enumerate(z):
        mean = calibration.running_mean(mean, row, i, 0.01)
    assert (z @ shared).mean() > 0.8
    centered = torch.stack([calibration.centered(row, mean) for row in z])
    assert (centered @ shared).abs().mean() < 0.3


def test_rank_correlation_matches_scipy():
    from scipy.stats import spearmanr

    g = torch.Generator().manual_seed(0)
    a = torch.randint(6, (40,), generator=g).float()
    b = a + torch.randint(5, (40,), generator=g)
    assert abs(float(calibration.rank_correlation(a, b)) - spearmanr(a, b).statistic) < 1e-9
    assert calibration.rank_correlation(a, torch.ones(40)) == 0


@pytest.mark.parametrize("target", [0.08, 0.3, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("beta", [2.0, 10.0, 50.0])
def test_the_initial_threshold_meets_the_target_on_uniform_ranks(target, beta):
    tau = control.initial_threshold(target, beta)
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)
    p = control.acceptance_probability(u, torch.tensor(tau, dtype=torch.float64), beta)
    assert abs(float(torch.trapezoid(p, u)) - target) < 1e-3


def test_anti_windup_lets_go_at_once():
    """After 5,000 impossible steps the threshold is back in its working range within one time constant."""
    tau, average = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    for _ in range(5000):
        tau, average = control.control(
            tau, average, torch.tensor(0.0), 0.3, 0.01, control.threshold_bounds(10)
        )
    assert tau == control.threshold_bounds(10)[0]
    for _ in range(250):
        tau, average = control.control(
            tau, average, torch.tensor(1.0), 0.3, 0.01, control.threshold_bounds(10)
        )
    assert tau > 0.7


def holds(kind: str, target: float, seed: int) -> None:
    decisions, thresholds = gated(kind, target, seed)
    assert abs(float(decisions.mean()) - target) < 0.02
    halves = decisions.reshape(4, 500).mean(1)
    assert (halves - target).abs().max() < 0.07
    low, high = control.threshold_bounds(10)
    assert low < thresholds.min() and thresholds.max() < high
    # no oscillation: the settled threshold wanders by a small part of its range
    assert thresholds[500:].std() < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_held(kind):
    holds(kind, 0.3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_target_is_held(kind, target, seed):
    holds(kind, target, seed)
