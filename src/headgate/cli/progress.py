"""What a training run shows while it goes: a bar on a terminal, a line per log elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import Progress, TaskID
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


def describe_log(logs: dict[str, object]) -> str:
    """The few figures of a log that fit on a line."""
    parts = []
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("eval_loss", "eval loss", "{:.4f}"),
        ("learning_rate", "lr", "{:.2e}"),
        ("tokens_per_second", "tok/s", "{:,.0f}"),
        ("gate/acceptance_rate", "accepted", "{:.0%}"),
        ("routing/utilization", "utilization", "{:.0%}"),
    ):
        if isinstance(logs.get(name), (int, float)):
            parts.append(f"{label} {form.format(logs[name])}")
    parts += [
        f"{k} {v:.4f}"
        for k, v in logs.items()
        if k.startswith("eval_") and k.endswith("_loss") and k != "eval_loss"
    ]
    return "  ".join(parts)


class Bar(TrainerCallback):
    """A progress bar with loss, learning rate, tokens/s and ETA."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.task = self.progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, detail=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, object] | None = None,
        **_: object,
    ) -> None:
        if self.task is not None and logs and describe_log(logs):
            self.progress.update(self.task, detail=describe_log(logs))


class Lines(TrainerCallback):
    """One plain line per log, with the time left."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.start, self.first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, object] | None = None,
        **_: object,
    ) -> None:
        text = describe_log(logs or {})
        if not text:
            return
        done = state.global_step - self.first
        left = (time.monotonic() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
        self.say(f"step {state.global_step}/{state.max_steps}  {text}  eta {left:.0f}s")
