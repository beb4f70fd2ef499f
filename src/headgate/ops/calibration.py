"""From a raw novelty to a score that a fixed sigmoid can read.

Raw novelty of an isotropic sketch is 1 - K/M, and it collapses to 0 when all batches share a direction;
either way a sigmoid with a fixed scale is a coin toss. Three corrections: the common direction is removed
from the sketch, the dependence on the number of tokens from its novelty, and the score is a rank.

Shapes: M sketch size, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.ops.subspace import unit


def centered(unit_M: Tensor, mean_M: Tensor) -> Tensor:
    """The unit sketch with the running mean of unit sketches removed, again of unit length.

    Equation: backward_gate (step 3): z <- unit(z / |z| - mean of z / |z|)
    Proved by: tests/backward_gate/test_calibration_control.py::test_centering_uncovers_what_a_shared_direction_hides
    """
    return unit(unit_M - mean_M)


def running_mean(mean: Tensor, value: Tensor, count: int, rate: float) -> Tensor:
    """Plain mean over the first 1/rate values, exponential afterwards. ``count``: values seen before."""
    weight = max(1 / (count + 1), rate)
    return mean + weight * (value - mean)


def windowed_rank(value: Tensor, window_W: Tensor, count: int) -> Tensor:
    """Mid-rank of a value among the window's first ``count`` entries, in (0, 1); 1/2 for an empty window.

    ``(#smaller + #equal / 2 + 1/2) / (count + 1)``: uniform for an exchangeable stream whatever its law, and
    1/2 for a constant one.

    Equation: backward_gate (step 3): rank = (#smaller + #equal / 2 + 1/2) / (W + 1)
    Proved by: tests/backward_gate/test_calibration_control.py::test_rank_is_monotone_symmetric_and_inside_the_unit_interval
    Proved by: tests/backward_gate/test_calibration_control.py::test_a_constant_stream_ranks_in_the_middle
    """
    seen = window_W[:count]
    below = (seen < value).sum() + 0.5 * (seen == value).sum()
    return (below + 0.5) / (count + 1)


def regression_moments(moments_4: Tensor, x: Tensor, y: Tensor, count: int, rate: float) -> Tensor:
    """Running ``[E x, E y, E x^2, E xy]``."""
    return running_mean(moments_4, torch.stack([x, y, x * x, x * y]), count, rate)


def length_corrected(novelty: Tensor, log_tokens: Tensor, moments_4: Tensor, ridge: float = 1e-2) -> Tensor:
    """Novelty minus its running regression on the log of the number of tokens.

    The more tokens are summed, the less noise is in the sketch and the lower its novelty: without this a
    gate prefers short batches. ``ridge`` (a variance of log tokens) keeps the slope at 0 where lengths do
    not vary.

    Equation: backward_gate (step 3): novelty - slope (log n - mean log n)
    Proved by: tests/backward_gate/test_calibration_control.py::test_length_correction_removes_the_dependence_on_tokens
    """
    x, y, xx, xy = moments_4.unbind()
    slope = (xy - x * y) / ((xx - x * x).clamp(min=0) + ridge)
    return novelty - slope * (log_tokens - x)


def rank_correlation(a_N: Tensor, b_N: Tensor) -> Tensor:
    """Spearman's rho with mid-ranks; 0 where one side is constant."""

    def ranks(values: Tensor) -> Tensor:
        below = (values[None, :] < values[:, None]).sum(1)
        equal = (values[None, :] == values[:, None]).sum(1)
        r = below.double() + 0.5 * equal
        return r - r.mean()

    x, y = ranks(a_N.double()), ranks(b_N.double())
    scale = torch.sqrt(x.square().sum() * y.square().sum())
    return torch.where(scale > 0, (x * y).sum() / scale.clamp(min=1e-300), torch.zeros_like(scale))
