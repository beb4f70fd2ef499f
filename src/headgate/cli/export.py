"""``headgate export RUN --to transformers|peft|merged|pruned|experts``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

from headgate.cli.console import err, out
from headgate.cli.options import JsonOption
from headgate.errors import CheckpointError
from headgate.experiments.export import Kind
from headgate.experiments.export import export as export_run
from headgate.experiments.run_directory import RunDirectory
from headgate.files import write_atomically
from headgate.training.checkpoint import last_valid


def export(
    run: Annotated[Path, typer.Argument(help="A run directory or its checkpoint.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="transformers: with its routing; peft: plain adapter; merged: full weights; pruned: without the closed "
            "blocks; experts: a method's experts.",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export-KIND.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of merged weights; default: as loaded.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of merged weights.")] = "5GB",
    licence: Annotated[str, typer.Option("--license", help="The model card's licence field.")] = "other",
    device: Annotated[str, typer.Option()] = "cpu",
    allow_partial: Annotated[bool, typer.Option(help="Export a run that has not finished.")] = False,
    mixture: Annotated[
        str | None,
        typer.Option(help="Of experts: farm=0.5,sports=0.5; default: the best on the validation rows."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of transformers: the adapter goes into the weights.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Write a run for other programs, and verify it by loading it with them."""
    source = run
    if (run / "recipe.yaml").exists():
        directory = RunDirectory(run)
        if directory.status != "complete":
            if not allow_partial:
                raise CheckpointError(
                    f"{run} is {directory.status}: finish it with `headgate train`, or pass --allow-partial"
                )
            found = last_valid(directory.trainer_dir)
            if found is None:
                raise CheckpointError(f"{run} has no whole checkpoint yet")
            source = found
    done = export_run(
        source,
        output or run / f"export-{to}",
        cast(Kind, to),
        dtype=dtype,
        max_shard_size=max_shard_size,
        licence=licence,
        device=device,
        mixture=mixture,
        merge=merge,
    )
    for note in done.notes:
        err.print(f"[yellow]note:[/yellow] {note}")
    out.print(f"{done.folder}: {', '.join(done.files)}", markup=False)
    if to != "experts":
        out.print(f"verified: reloaded logits differ by {done.difference:.1e} of the largest")
    if json_file is not None:
        write_atomically(json_file, json.dumps(asdict(done), indent=1))
