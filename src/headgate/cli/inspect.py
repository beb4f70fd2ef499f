"""``headgate inspect RUN``: what the routers and schemas of a run learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headgate.cli.console import out
from headgate.experiments.inspection import inspect_run
from headgate.experiments.run_directory import RunDirectory


def inspect(
    run: Annotated[Path, typer.Argument(help="A finished run directory.", show_default=False)],
    limit: Annotated[int, typer.Option(help="Examples to look at.")] = 200,
) -> None:
    """Say what each schema does; tables as JSON and a heat map as PNG and SVG are written beside the run."""
    for name, path in inspect_run(RunDirectory(run), limit=limit).items():
        for block in json.loads(path.read_text())["blocks"]:
            told = [f"block {block['block']}", f"{len(block['dead'])} dead of {len(block['load'])}"]
            for field in ("nmi", "alignment", "reuse"):
                if block[field] is not None:
                    told.append(f"{field} {block[field]:.2f}")
            table = Table(title=f"{name}: {', '.join(told)}", title_justify="left")
            for column in ("schema", "load", "top tokens (mean gate)", "top examples"):
                table.add_column(column, justify="right" if column in ("schema", "load") else "left")
            order = sorted(range(len(block["load"])), key=lambda s: -block["load"][s])
            for schema in order[:8]:
                tokens = "  ".join(
                    f"{token!r} {weight:.2f}" for token, weight in block["top_tokens"][schema][:6]
                )
                examples = ", ".join(str(index) for index, _ in block["top_examples"][schema])
                table.add_row(str(schema), f"{block['load'][schema]:.1%}", tokens, examples)
            out.print(table)
        out.print(f"written: {path}, {path.with_suffix('.png')}, {path.with_suffix('.svg')}", markup=False)
