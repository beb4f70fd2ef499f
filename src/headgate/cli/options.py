"""Arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from headgate.cli.quiet import quiet_libraries
from headgate.errors import ConfigError
from headgate.experiments.arms import arm_recipes
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import load_recipe, parse_yaml, recipe_of_content

RecipeArgument = Annotated[
    Path, typer.Argument(help="A recipe (YAML), or the name of one of the package's.", show_default=False)
]
OptionalRecipe = Annotated[
    Path | None,
    typer.Argument(
        help="A recipe (YAML), or the name of one of the package's; or give --data instead.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A model of the hub, a folder, or embedded.", show_default=False)
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="Instead of a recipe: a file or folder of one's own rows.", show_default=False
    ),
]
MethodsOption = Annotated[
    str | None,
    typer.Option(
        "--methods", help="Of a recipe drafted from --data: names, with commas.", show_default=False
    ),
]
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
LiveOption = Annotated[
    bool,
    typer.Option("--live", help="Rewrite the page while it runs, and serve it on 127.0.0.1; it says where."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")
]


def method_names(given: str | None) -> list[str]:
    """``a,b`` as names."""
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def read_recipe(recipe: Path, overrides: Sequence[str] | None, *, compared: bool = False) -> Recipe:
    """A recipe that will be run. What is wrong with it (``compared``: with its arms too) is said before torch and
    transformers are imported."""
    loaded = load_recipe(recipe, overrides or [])
    if compared and loaded.compare is not None and loaded.compare.map is None:
        arm_recipes(loaded)
    quiet_libraries()
    return loaded


def chosen_recipe(
    recipe: Path | None,
    model: str | None,
    data: str | None,
    methods: str | None,
    overrides: Sequence[str],
    *,
    compared: bool = True,
) -> Recipe:
    """The recipe that was named, or one drafted from ``--data``: ``compared``, or with all ``--methods`` in one run.

    Raises ConfigError where both or neither is given.
    """
    if (recipe is None) == (data is None):
        raise ConfigError(
            "give a recipe, or --data FILE (with --model NAME) to have one drafted: one of them"
        )
    if recipe is not None:
        if model is not None or methods is not None:
            flag, cure = ("--model", "model.name_or_path") if model is not None else ("--methods", "methods")
            raise ConfigError(f"{flag} goes with --data; over a recipe write --set {cure}=...")
        return read_recipe(recipe, overrides, compared=compared)
    quiet_libraries()
    from headgate.experiments.draft import draft

    names = method_names(methods)
    drafted = draft(str(data), model or "embedded", names)
    if not compared:
        drafted = drafted.as_one_run(names)
    return recipe_of_content(drafted.content, overrides, f"drafted from {data}")


def executor_options(given: Sequence[str]) -> dict[str, object]:
    """``--option key=value`` as a mapping of YAML values."""
    options: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: write it as --option key=value")
        options[key] = parse_yaml(value, f"--option {key}")
    return options
