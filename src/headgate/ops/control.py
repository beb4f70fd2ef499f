"""The threshold that holds an acceptance rate: a short-EMA integral controller with anti-windup."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SATURATION = 7.0
"""|logit| beyond which an acceptance probability no longer moves: sigmoid(7) = .999."""


def acceptance_probability(score: Tensor, threshold: Tensor, beta: float) -> Tensor:
    """``sigmoid(beta (score - tau))``: SLoRA, step 6.

    Equation: backward_gate (step 4): P(accept) = sigmoid(beta (score - tau))
    Proved by: tests/backward_gate/test_calibration_control.py::test_the_initial_threshold_meets_the_target_on_uniform_ranks
    Proved by: tests/backward_gate/test_equations.py::test_acceptance_is_a_logistic_of_slope_beta
    """
    return torch.sigmoid(beta * (score - threshold))


def expected_acceptance(threshold: float, beta: float) -> float:
    """Mean acceptance of scores uniform on [0, 1] (what a windowed rank is): the integral of the sigmoid."""

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    return (softplus(beta * (1 - threshold)) - softplus(-beta * threshold)) / beta


def threshold_bounds(beta: float) -> tuple[float, float]:
    """Thresholds outside these accept (or reject) every score in [0, 1]: integrating further is windup."""
    return -SATURATION / beta, 1 + SATURATION / beta


def initial_threshold(target: float, beta: float) -> float:
    """The threshold whose expected acceptance is ``target``, by bisection."""
    low, high = threshold_bounds(beta)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_acceptance(middle, beta) > target else (low, middle)
    return (low + high) / 2


def control(
    threshold: Tensor,
    average: Tensor,
    accepted: Tensor,
    target: float,
    rate: float,
    bounds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """One step: ``a <- a + 10 rate (accepted - a)``, ``tau <- clip(tau + rate (a - target))``.

    The sum of ``a - target`` is the way tau has gone divided by ``rate``, so over T steps the realised rate
    is off by at most ``|tau_T - tau_0| / (rate T)``. The average is ten times faster than the integral:
    for any slope of the acceptance up to 2.5 (beta = 10) the pair is overdamped and does not oscillate.

    Equation: backward_gate (step 4): a <- a + 10 eta (accepted - a), tau <- clip(tau + eta (a - target))
    Proved by: tests/backward_gate/test_calibration_control.py::test_the_target_is_held
    Proved by: tests/backward_gate/test_calibration_control.py::test_anti_windup_lets_go_at_once
    """
    average = average + min(1.0, 10 * rate) * (accepted - average)
    moved = threshold + rate * (average - target)
    return torch.clamp(moved, *bounds), average


def quantile_probability(score: Tensor, window_W: Tensor, share: float) -> float:
    """Probability with which a score belongs to the top ``share`` of itself and the window: 1, 0, or a lot among ties.

    A score stands between ranks ``b/(W+1)`` and ``(b+e+1)/(W+1)``, b smaller ones and e equal ones before it. Spread
    evenly over that interval its rank is uniform for an exchangeable stream whatever its law, a constant one
    included, so the expected acceptance is exactly ``share``: the randomised rank test. Ours; SLoRA has the sigmoid.
    """
    count = window_W.numel() + 1
    below, equal = int((window_W < score).sum()), int((window_W == score).sum())
    low, high = below / count, (below + equal + 1) / count
    return min(1.0, max(0.0, (high - (1 - share)) / (high - low)))


OUTSTANDING = 3.0
"""Robust standard deviations above the median from which a score stands out: of a normal sample .1% do."""


def outstanding_share(values_W: Tensor) -> float:
    """Share of values that stand out of their window: above the median by 3 * 1.4826 MAD (Hampel's identifier).

    Where a share p < 1/2 of the values lies clear of the others it is p. From p = 1/2 on the median is one of the new
    values and nothing stands out: keep W at twice the longest burst. Invariant to shift and scale; 0 of a constant
    window. That the dose follows it is ours.
    """
    median = values_W.quantile(0.5)
    spread = 1.4826 * (values_W - median).abs().quantile(0.5)
    return float((values_W > median + OUTSTANDING * spread).double().mean())


def with_floor(probability: float, floor: float) -> float:
    """``f + (1 - f) p``: a share f is admitted by lot, the others by their score. Ours.

    Every offered micro-batch keeps a chance of at least f, so inverse-probability weights stay below 1/f.
    """
    return floor + (1 - floor) * probability


def share_above_floor(share: float, floor: float) -> float:
    """What is left to choose by score, of a dose that includes the floor: ``(q - f) / (1 - f)``."""
    return (share - floor) / (1 - floor)
