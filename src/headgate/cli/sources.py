"""``headgate sources``: what can be named as a source, and one row of each."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from headgate.cli.console import out
from headgate.data.config import SourceConfig
from headgate.data.readers import SOURCES, source_named
from headgate.data.readers.catalogue import FORMATS, unknown_source


def sources(
    name: Annotated[
        str | None, typer.Argument(help="Show one source: a row as published, and as read.")
    ] = None,
) -> None:
    """List the sources that a recipe can name; with a name, one row of it, in and out."""
    if name is not None:
        source = source_named(name)
        if source is None:
            raise unknown_source(name)
        out.print(f"{name}: {source.summary}", markup=False)
        if source.hub:
            out.print(
                f"hub: {source.hub[0]}" + (f" ({source.hub[1]})" if source.hub[1] else ""), markup=False
            )
        out.print("in:  " + json.dumps(source.example, ensure_ascii=False), markup=False)
        for row in source.reader(source.example, "example", SourceConfig(source="auto", path="example")):
            out.print("out: " + json.dumps(row, ensure_ascii=False), markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("source", "on the hub", "what it is"):
        table.add_column(column, overflow="fold")
    for known, source in SOURCES.items():
        table.add_row(known, source.hub[0] if source.hub else "", source.summary)
    out.print(table)
    out.print(f"Formats, taken for auto: {', '.join(FORMATS)}. Any owner/name of the hub is a source too.")
