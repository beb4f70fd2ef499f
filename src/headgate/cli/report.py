"""``headgate report DIR``: one self-contained page of a comparison, a run, or a folder of runs; ``--live`` while they go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from headgate.cli.console import out


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A comparison, a run directory, a folder of runs, or a comparison.json alone.",
            show_default=False,
        ),
    ],
    figures: Annotated[
        str | None, typer.Option(help="Only the figures of this method, from whatever runs the folder holds.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Rewrite the page while runs go on, served on 127.0.0.1.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            help="Of --live. Without one, the same for a folder every time (or any, where it is taken); 0 takes any.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[int, typer.Option(help="Of --live: seconds between two pages, at least.")] = 5,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Write DIR/report: index.html (one file, no network), report.md, figures (PNG, SVG) and CSV tables."""
    if figures is not None:
        from headgate.experiments.report import write_figures

        for path in write_figures(folder, figures):
            out.print(str(path), markup=False)
        return
    if live:
        from headgate.experiments.report.live import follow

        if hasattr(os, "nice"):  # not on Windows
            os.nice(10)
        stopped = _parent_is_gone() if with_parent else lambda: False
        follow(folder, port, every, out.print, stopped)
        return
    from headgate.experiments.report import write_report

    written = write_report(folder)
    out.print(f"report: {written.page}", markup=False)
    out.print(
        f"  beside it: {written.markdown.name}, {len(written.figures)} figure files, "
        f"{', '.join(path.name for path in written.tables)}",
        markup=False,
    )


def _parent_is_gone() -> Callable[[], bool]:
    """Whether standard input has ended, which is how one learns that whoever started this has died or is done."""
    gone = threading.Event()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        gone.set()

    threading.Thread(target=watch, daemon=True).start()
    return gone.is_set
