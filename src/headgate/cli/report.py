"""``headgate report DIR``: one self-contained page of a comparison, a run, or a folder of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headgate.cli.console import out
from headgate.experiments.report import write_figures, write_report


def report(
    folder: Annotated[
        Path, typer.Argument(help="A comparison, a run directory, or a folder of runs.", show_default=False)
    ],
    figures: Annotated[
        str | None, typer.Option(help="Only the figures of this method, from whatever runs the folder holds.")
    ] = None,
) -> None:
    """Write DIR/report: index.html (one file, no network), report.md, figures (PNG, SVG) and CSV tables."""
    if figures is not None:
        for path in write_figures(folder, figures):
            out.print(str(path), markup=False)
        return
    written = write_report(folder)
    out.print(f"report: {written.page}", markup=False)
    out.print(
        f"  beside it: {written.markdown.name}, {len(written.figures)} figure files, "
        f"{', '.join(path.name for path in written.tables)}",
        markup=False,
    )
