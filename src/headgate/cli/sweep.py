"""``headgate sweep RECIPE``: every run of a grid or a list, in parallel, idempotent."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table

from headgate.cli.console import out
from headgate.cli.options import (
    ExecutorOption,
    LiveOption,
    RecipeArgument,
    SetOption,
    WorkersOption,
    executor_options,
    read_recipe,
)

if TYPE_CHECKING:
    from headgate.experiments.records import SweepTable
    from headgate.experiments.sweep import Progress, Sweep


def sweep(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    executor: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
    workers: WorkersOption = None,
    option: ExecutorOption = None,
    retries: Annotated[
        int, typer.Option(help="How often a run whose process was killed is tried again.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and their state; run nothing.")
    ] = False,
    live: LiveOption = False,
) -> None:
    """Run every combination of the recipe's sweep: section. Complete runs are skipped, partial ones resume."""
    loaded = read_recipe(recipe, overrides)
    # after the recipe: a typo is told before torch is imported
    from headgate.experiments.executors import make_executor
    from headgate.experiments.report import write_report
    from headgate.experiments.report.live import followed
    from headgate.experiments.sweep import Sweep

    planned = Sweep(loaded, say=out.print)
    if dry_run:
        for run in planned.runs:
            out.print(f"{run.directory.status:9} {run.label}  {run.directory.path}")
        return
    chosen = make_executor(executor, workers, executor_options(option or []))
    with followed(planned.folder, live) as page:
        with _live(planned) as show:
            table = planned.execute(chosen, retries=retries, show=show)
        out.print(groups_table(table))
        failed = [row for row in table["runs"] if row["status"] != "complete"]
        for row in failed:
            out.print(f"{row['status']}: {row['label']}" + (f": {row['error']}" if "error" in row else ""))
        out.print(f"table: {planned.folder / 'sweep.json'} (also .csv and .md)")
        if not failed:  # the follower waits for those that another command will make
            out.print(f"report: {page()}")
    if failed:
        out.print(f"report: {write_report(planned.folder).page}")
        out.print(
            f"{len(failed)} of {len(table['runs'])} runs are not complete: run the same command to try them again"
        )
        raise typer.Exit(1)


def groups_table(table: SweepTable) -> Table:
    """One row per setting: mean and SD over its seeds."""
    from headgate.experiments.sweep_table import cell, headline

    columns = headline(table)
    shown = Table(title=f"{table['name']}: {len(table['runs'])} runs", title_justify="left")
    for column in ("runs", "n", *(c.removeprefix("evaluation.").removeprefix("training.") for c in columns)):
        shown.add_column(column, justify="left" if column == "runs" else "right")
    for group in table["groups"]:
        shown.add_row(group["label"], str(group["n"]), *(cell(group, column) for column in columns))
    return shown


@contextmanager
def _live(sweep: Sweep) -> Iterator[Callable[[Progress], None]]:
    """A table that redraws itself on a terminal; elsewhere the sweep's own lines are enough."""
    if not sys.stdout.isatty():
        yield lambda _progress: None
        return
    with Live(console=out, refresh_per_second=2, transient=True) as live:
        yield lambda progress: live.update(_progress_table(progress))


def _progress_table(progress: Progress) -> Table:
    shown = Table(
        title=None if progress.eta is None else f"about {progress.eta / 60:.0f} min left",
        title_justify="left",
    )
    for column in ("run", "state", "step", "loss", "seconds"):
        shown.add_column(column, justify="left" if column in ("run", "state") else "right")
    for run in progress.runs:
        key = run.recipe.run_id()
        if key in progress.running:
            rows = run.directory.metrics()
            last = rows[-1] if rows else {}
            loss = next((row["loss"] for row in reversed(rows) if row.get("loss") is not None), None)
            steps = f"{last.get('step', 0)}/{run.recipe.steps_given or '?'}"
            shown.add_row(
                run.label,
                "running",
                steps,
                "-" if loss is None else f"{loss:.4f}",
                f"{time.monotonic() - progress.running[key]:.0f}",
            )
        else:
            shown.add_row(run.label, run.directory.status, "", "", "")
    return shown
