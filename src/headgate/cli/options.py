"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set training.max_steps=60 (repeatable).")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")
]
