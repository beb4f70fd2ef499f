"""``headgate demo``: each method at what it is for, beside its honest baseline; four comparisons, one page."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headgate.cli.console import out
from headgate.cli.options import SetOption, WorkersOption, method_names
from headgate.experiments.demo import PARTS, execute, parts
from headgate.experiments.report import write_overview
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.words import verdicts
from headgate.experiments.shipped import opening


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where its runs and its page go.")] = Path(
        "runs/demo"
    ),
    only: Annotated[
        str | None, typer.Option(help=f"Some of {', '.join(PARTS)}, with commas.", show_default=False)
    ] = None,
    workers: WorkersOption = None,
    overrides: SetOption = None,
) -> None:
    """Run four small comparisons on the embedded model, no network, and write one page over them."""
    began = time.monotonic()
    planned = parts(output, method_names(only), overrides or [])
    at_once = min(4, os.cpu_count() or 1) if workers is None else workers
    execute(planned, output, at_once, overrides or [], out.print)
    table = Table(title="each method at what it is for", title_justify="left")
    for column in ("question", "arm", "against", "verdict"):
        table.add_column(column, overflow="fold")
    for part in planned:
        study, question = read_study(part.folder), f"{opening(part.recipe)}?"
        for found in verdicts(study):
            table.add_row(question, found.arm, study.baseline, f"{found.words}; {'; '.join(found.details)}")
            question = ""
    out.print(table)
    page = write_overview(
        "What each method is for",
        "Four small comparisons on a model of 1.5M parameters and generated word problems. Small models, short runs: "
        "a verdict here is a verdict on these, not on language models at large.",
        {part.name: part.folder for part in planned},
        output,
        {part.name: f"{opening(part.recipe)}?" for part in planned},
    )
    out.print(f"{time.monotonic() - began:.0f} s in all")
    out.print(f"picture: {page.with_name('overview.png')}")
    out.print(f"report: {page}")
