"""``headgate init`` and ``headgate recipes``: a recipe from a file of one's own, and those that come with the package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headgate.cli.console import out
from headgate.cli.options import DataOption, MethodsOption, ModelOption, method_names
from headgate.errors import ConfigError


def init(
    data: DataOption = None,
    model: ModelOption = "embedded",
    methods: MethodsOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Look at a data file and write a commented recipe for it; without one, a recipe over generated problems."""
    if output.exists() and not force:
        raise ConfigError(f"{output} exists: choose another --output, or --force to replace it")
    if data is None:
        from headgate.experiments.shipped import find_shipped

        text, notes = (
            find_shipped("wordmath/lora").read_text(),
            ["generated word problems (no --data was given)"],
        )
    else:
        from headgate.experiments.draft import draft

        drafted = draft(data, model or "embedded", method_names(methods))
        text, notes = drafted.text, drafted.notes
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    for note in notes:
        out.print(note, markup=False, style="dim")
    out.print(f"written: {output}", markup=False)
    written = shlex.quote(str(output))
    out.print(f"next: headgate data {written}; headgate compare {written}", markup=False)


def recipes(
    action: Annotated[str | None, typer.Argument(help="show NAME, or NAME alone: print that recipe.")] = None,
    name: Annotated[str | None, typer.Argument(show_default=False)] = None,
) -> None:
    """List the recipes that come with the package; every verb takes their names in place of a file."""
    from headgate.experiments.shipped import find_shipped, opening, shipped, shipped_names

    wanted = name if action == "show" and name is not None else action
    if action == "show" and name is None:
        raise ConfigError(
            "headgate recipes show NAME: give the name of a recipe (headgate recipes lists them)"
        )
    if wanted is not None:
        print(find_shipped(wanted).read_text(), end="")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it asks", overflow="fold")
    for known in shipped_names():
        path = shipped(known)
        table.add_row(known, "" if path is None else opening(path))
    out.print(table)
