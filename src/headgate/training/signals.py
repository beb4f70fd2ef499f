"""Ctrl-C and SIGTERM: finish the optimizer step, save, stop; on every rank, whichever of them was told."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from headgate.training.processes import world_size

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

ECHO = 10.0
"""Seconds in which a launcher may pass on to a rank the Ctrl-C that the terminal has already sent it."""


class StopSignals(TrainerCallback):
    """Ctrl-C and SIGTERM finish the optimizer step, save a checkpoint and stop; a second one stops at once.

    Attributes:
        received: the signal that this process got, while it is listening (``with``).
        agreed: whether any rank had got one at the end of an optimizer step; set by the trainer, on all alike.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed = False
        self._at = 0.0
        self._old: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @property
    def pending(self) -> bool:
        return self.received is not None

    @property
    def stopping(self) -> bool:
        """Whether the run stops here: what one process was told, several must have agreed on."""
        return self.agreed if world_size() > 1 else self.pending

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            if world_size() > 1 and time.monotonic() - self._at < ECHO:
                return
            raise KeyboardInterrupt
        self.received, self._at = number, time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl | None:
        if self.stopping:
            control.should_save = True
            control.should_training_stop = True
        return control
