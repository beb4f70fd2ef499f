"""What a training run shows while it goes: a bar on a terminal, a line per log elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress, TaskID
from transformers import TrainerCallback

from headgate.cli.console import describe_log, out


class Bar(TrainerCallback):
    """A progress bar with loss, learning rate, tokens/s and ETA."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task = self.progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, detail=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.task is not None and logs and describe_log(logs):
            self.progress.update(self.task, detail=describe_log(logs))


class Lines(TrainerCallback):
    """One plain line per log, with the time left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        text = describe_log(logs or {})
        if not text:
            return
        done = state.global_step - self.first
        left = (time.monotonic() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
        out.print(f"step {state.global_step}/{state.max_steps}  {text}  eta {left:.0f}s")
