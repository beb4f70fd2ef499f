"""A learning-rate schedule on the chosen clock: offered windows, or accepted ones only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.lr_scheduler import LambdaLR


class ClockedScheduler:
    """Any torch schedule whose ``step`` moves only when ``ticks()`` says so."""

    def __init__(self, inner: LambdaLR, ticks: Callable[[], bool]) -> None:
        self.inner, self._ticks = inner, ticks

    def step(self, epoch: int | None = None) -> None:
        if self._ticks():
            self.inner.step(epoch)

    @property
    def ticks_taken(self) -> int:
        """Steps of the schedule's own clock so far."""
        return int(self.inner.last_epoch)

    def get_last_lr(self) -> list[float | Tensor]:
        return list(self.inner.get_last_lr())

    def state_dict(self) -> dict[str, object]:
        return dict(self.inner.state_dict())

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.inner.load_state_dict(state)

    def continue_from(self, ticks: int) -> None:
        """Stand where a schedule stood after ``ticks``, over this one's own (perhaps other) parameter groups."""
        self.inner.last_epoch = ticks
        rates = [
            base * factor(self.inner.last_epoch)
            for base, factor in zip(self.inner.base_lrs, self.inner.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.inner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.inner._last_lr = rates
