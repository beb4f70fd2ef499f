"""What the command line shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from headgate.experiments.run import Console

out = RichConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = RichConsole(stderr=True, highlight=False, soft_wrap=True)


def describe_log(logs: dict[str, Any]) -> str:
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


class _Bar(TrainerCallback):
    """A progress bar with loss, learning rate, tokens/s and ETA."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.task = progress, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task = self.progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, detail=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.task is not None and logs and describe_log(logs):
            self.progress.update(self.task, detail=describe_log(logs))


class _Lines(TrainerCallback):
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


@contextmanager
def live_console() -> Iterator[Console]:
    """A Console for ``experiments.run``; warnings become one-line notes."""
    old = warnings.showwarning
    seen: set[str] = set()

    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        text = str(message)
        if issubclass(category, UserWarning) and text not in seen:
            seen.add(text)
            err.print(f"[yellow]note:[/yellow] {text}")

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        if not sys.stdout.isatty():
            yield Console(say=out.print, callbacks=[_Lines()])
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        ]
        with Progress(*columns, console=out) as progress:
            tasks: dict[str, Any] = {}

            def advance(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what, total=total, detail="")
                progress.update(tasks[what], completed=done)

            yield Console(say=progress.console.print, callbacks=[_Bar(progress)], progress=advance)
    finally:
        warnings.showwarning = old


def result_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """One row a task: accuracy with its interval, loss, perplexity, items, and the depth it ran at where that varies."""
    routed = any("depth" in metrics for metrics in rows.values())
    table = Table(title=title, title_justify="left")
    for column in ("task", "accuracy (95%)", "loss", "perplexity", "items", "truncated"):
        table.add_column(column, justify="left" if column == "task" else "right")
    if routed:
        table.add_column("depth (FLOPs run)", justify="right")
    for name, metrics in rows.items():
        accuracy = (
            f"{metrics['accuracy']:.1%} [{metrics['low']:.1%}, {metrics['high']:.1%}]"
            if "accuracy" in metrics
            else "-"
        )
        table.add_row(
            name,
            accuracy,
            f"{metrics['loss']:.4f}" if "loss" in metrics else "-",
            f"{metrics['perplexity']:.3f}" if "perplexity" in metrics else "-",
            str(metrics.get("items", "-")),
            f"{metrics['truncated_rate']:.1%}" if "truncated_rate" in metrics else "-",
            *(
                [f"{metrics['depth']:.1%} ({metrics['executed_share']:.1%})" if "depth" in metrics else "-"]
                * routed
            ),
        )
    return table
