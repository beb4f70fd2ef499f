"""FixedPrecision: state that moves with a model but never changes its precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn


class FixedPrecision(nn.Module):
    """A module whose buffers follow ``.to(device)`` and ignore ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    Buffers named in ``stays_on_cpu`` do not move either: counters that steer Python, which must be read
    without waiting for a device.
    """

    stays_on_cpu: ClassVar[frozenset[str]] = frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedPrecision:
        if recurse:
            for child in self.children():
                child._apply(fn)
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self.stays_on_cpu:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self
