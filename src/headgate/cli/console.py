"""What the command line shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from headgate.experiments.console import Console

out = RichConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = RichConsole(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def live_console() -> Iterator[Console]:
    """A Console for ``experiments.run``; warnings become one-line notes."""
    from headgate.cli.progress import Bar, Lines
    from headgate.experiments.console import Console

    old = warnings.showwarning
    seen: set[str] = set()

    def show(message: object, category: type[Warning], *_: object, **__: object) -> None:
        text = str(message)
        if issubclass(category, UserWarning) and text not in seen:
            seen.add(text)
            err.print(f"[yellow]note:[/yellow] {text}")

    warnings.showwarning = show
    try:
        if not sys.stdout.isatty():
            yield Console(say=out.print, callbacks=[Lines(out.print)])
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        ]
        with Progress(*columns, console=out) as progress:
            tasks: dict[str, TaskID] = {}

            def advance(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what, total=total, detail="")
                progress.update(tasks[what], completed=done)

            yield Console(say=progress.console.print, callbacks=[Bar(progress)], progress=advance)
    finally:
        warnings.showwarning = old


def result_table(title: str, rows: dict[str, dict[str, object]]) -> Table:
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
