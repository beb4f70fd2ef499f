"""``headgate runs``, ``headgate diff A B``, ``headgate cite RUN``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headgate.cli.console import out
from headgate.errors import CheckpointError
from headgate.experiments.listing import citations, difference, list_runs
from headgate.experiments.run_directory import RunDirectory

RunArgument = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]


def runs(
    root: Annotated[Path, typer.Argument(help="Folder to look below.")] = Path("runs"),
    where: Annotated[list[str] | None, typer.Option(help="Keep runs with key=value (repeatable).")] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write every number of every run here.")
    ] = None,
) -> None:
    """List run directories; --csv exports all their figures."""
    rows = list_runs(root, where or [])
    if not rows:
        out.print(f"no run below {root}")
        return
    table = Table()
    shown = [
        "run",
        "status",
        "seed",
        "methods",
        "training.steps",
        "training.eval_loss",
        "training.seconds",
        "verified",
    ]
    shown += sorted(
        {k for row in rows for k in row if k.startswith("evaluation.") and k.endswith((".accuracy", ".loss"))}
    )[:4]
    for column in shown:
        label = column.removeprefix("training.").removeprefix("evaluation.")
        table.add_column(label, no_wrap=column == "run", overflow="fold")
    for row in rows:
        values = [row.get(column, "-") for column in shown]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    out.print(table)
    if csv_file is not None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        out.print(f"written: {csv_file}")


def _directory(path: Path) -> RunDirectory:
    directory = RunDirectory(path)
    if not directory.recipe_file.exists():
        raise CheckpointError(f"{path} is no run directory: it has no recipe.yaml")
    return directory


def diff(a: RunArgument, b: RunArgument) -> None:
    """Show what differs between two runs: recipe, environment, results."""
    for section, entries in difference(_directory(a), _directory(b)).items():
        out.print(f"[bold]{section}[/bold]" + ("" if entries else ": no difference"))
        for key, (left, right) in entries.items():
            out.print(f"  {key}: {left} | {right}", markup=False)


def cite(run: RunArgument) -> None:
    """Print BibTeX of what a run used."""
    print("\n\n".join(citations(_directory(run))))
