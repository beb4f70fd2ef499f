"""ScoreWindow: raw scores to calibrated ones, and the threshold that holds the acceptance rate.

All of it is a few hundred numbers, and every decision ends in Python: the buffers stay on the CPU whatever
``.to(device)`` asks for, so that one transfer per micro-batch is all that a decision costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision
from headgate.ops import calibration, control


class ScoreWindow(FixedPrecision):
    """A sliding window of raw scores, the regression on length, and the controller.

    Args:
        size: window. target: acceptance rate to hold. rate: of the threshold and of the running moments.
        beta: steepness of the decision, for the bounds of the threshold.
        threshold, bounds: where the controller starts and between which it stays.
    """

    values: Tensor
    losses: Tensor
    seen: Tensor
    moments: Tensor
    threshold: Tensor
    average: Tensor
    decisions: Tensor

    def __init__(
        self,
        size: int,
        *,
        target: float,
        rate: float,
        beta: float,
        threshold: float | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.target, self.rate = size, target, rate
        self.bounds = control.threshold_bounds(beta) if bounds is None else bounds
        start = control.initial_threshold(target, beta) if threshold is None else threshold
        double = torch.float64
        self.register_buffer("values", torch.zeros(size, dtype=double))
        self.register_buffer("losses", torch.zeros(size, dtype=double))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("decisions", torch.zeros((), dtype=torch.long))
        self.register_buffer("moments", torch.zeros(4, dtype=double))
        self.register_buffer("threshold", torch.tensor(start, dtype=double))
        self.register_buffer("average", torch.tensor(target, dtype=double))

    stays_on_cpu = frozenset({"values", "losses", "seen", "moments", "threshold", "average", "decisions"})

    @property
    def count(self) -> int:
        return min(int(self.seen), self.size)

    @property
    def full(self) -> Tensor:
        """The values seen, in no particular order."""
        return self.values[: self.count]

    def corrected(self, raw: float, tokens: float) -> float:
        """The raw score with its running dependence on log(tokens) removed."""
        x = torch.tensor(math.log(max(1.0, tokens)), dtype=torch.float64)
        return float(calibration.length_corrected(torch.tensor(raw, dtype=torch.float64), x, self.moments))

    def rank(self, value: float) -> float:
        """Mid-rank in the window, in (0, 1)."""
        return float(
            calibration.windowed_rank(torch.tensor(value, dtype=torch.float64), self.values, self.count)
        )

    def loss_rank(self, loss: float) -> float:
        """Mid-rank of a loss among the window's losses."""
        return float(
            calibration.windowed_rank(torch.tensor(loss, dtype=torch.float64), self.losses, self.count)
        )

    def push(self, value: float, raw: float, loss: float, tokens: float) -> None:
        """Remember an offered micro-batch, accepted or not."""
        place = int(self.seen) % self.size
        self.values[place], self.losses[place] = value, loss
        x = torch.tensor(math.log(max(1.0, tokens)), dtype=torch.float64)
        y = torch.tensor(raw, dtype=torch.float64)
        moments = calibration.regression_moments(self.moments, x, y, int(self.seen), self.rate)
        self.moments.copy_(moments)
        self.seen += 1

    def decided(self, accepted: bool) -> None:
        """Move the threshold after a decision that it took."""
        new = control.control(
            self.threshold,
            self.average,
            torch.tensor(float(accepted), dtype=torch.float64),
            self.target,
            self.rate,
            self.bounds,
        )
        self.threshold.copy_(new[0])
        self.average.copy_(new[1])
        self.decisions += 1
