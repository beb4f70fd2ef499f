"""Arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from headgate.errors import ConfigError
from headgate.experiments.recipe_file import parse_yaml

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set training.max_steps=60 (repeatable).")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(help="Runs at a time, each in its own process. local: one a GPU, else one a core."),
]
ExecutorOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="Of the executor: --option slurm_partition=gpu (repeatable)."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")
]


def executor_options(given: Sequence[str]) -> dict[str, Any]:
    """``--option key=value`` as a mapping of YAML values."""
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: write it as --option key=value")
        options[key] = parse_yaml(value, f"--option {key}")
    return options
