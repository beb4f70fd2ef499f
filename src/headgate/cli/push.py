"""``headgate push FOLDER_OR_RUN REPO``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headgate.cli.console import err, out
from headgate.errors import ConfigError
from headgate.experiments.publish import look_at, publish


def push(
    run: Annotated[
        Path, typer.Argument(help="An export, or a run that has one (RUN/export-KIND).", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="Of a run: which of its exports.")] = "transformers",
    private: Annotated[bool, typer.Option(help="A private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; no network.")] = False,
) -> None:
    """Publish an export with its card, weights and modeling file."""
    folder = run
    if (run / "recipe.yaml").exists():
        folder = run / f"export-{to}"
        if not folder.exists():
            raise ConfigError(
                f"{run} has no export-{to}: write it with `headgate export {run} --to {to}` first"
            )
    found = look_at(folder, repo)
    for name, size in found.files.items():
        out.print(f"{size:>12,}  {name}", markup=False)
    shown = ", ".join(f"{key} {found.card[key]}" for key in ("license", "base_model") if key in found.card)
    out.print(
        f"{len(found.files)} files, {sum(found.files.values()):,} bytes for {repo}: {shown}", markup=False
    )
    for warning in found.warnings:
        err.print(f"[yellow]note:[/yellow] {warning}")
    if dry_run:
        out.print("dry run: nothing was sent")
        return
    out.print(publish(folder, found, private=private), markup=False)
