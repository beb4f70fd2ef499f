"""``headgate train RECIPE``: the plan, the run, the table."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from headgate.cli.console import live_console, out, result_table
from headgate.cli.options import (
    DataOption,
    MethodsOption,
    ModelOption,
    OptionalRecipe,
    SetOption,
    chosen_recipe,
)
from headgate.errors import ConfigError
from headgate.experiments.recipe_file import aliases_used


def train(
    recipe: OptionalRecipe = None,
    overrides: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    methods: MethodsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Demand a checkpoint to resume from.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, deleting this recipe's run.")] = False,
    nproc: Annotated[
        int, typer.Option(min=1, help="Ranks on this machine, a GPU each; the batch grows with them.")
    ] = 1,
) -> None:
    """Train, evaluate, and write a run directory. A partial run resumes where it stopped."""
    loaded = chosen_recipe(recipe, model, data, methods, overrides or [], compared=False)
    from headgate.cli.launch import launch
    from headgate.experiments.plan import plan
    from headgate.experiments.run import run
    from headgate.training import processes

    if nproc > 1:
        if recipe is None:
            raise ConfigError(
                "--nproc starts a recipe's file on every rank: write it first with headgate init --data ..."
            )
        flags = [*(["--resume"] if resume else []), *(["--fresh"] if fresh else [])]
        changes = [part for change in overrides or [] for part in ("--set", change)]
        raise typer.Exit(launch(["train", str(recipe), *changes, *flags], nproc, loaded.model.device))
    processes.join(loaded.model.device)
    processes.on_writer(
        lambda: out.print(plan(loaded, aliases_used(recipe) if recipe else [], processes.world_size()))
    )
    if not processes.is_writer():  # it follows rank 0, which speaks
        warnings.simplefilter("ignore")
        run(loaded, fresh=fresh, resume=resume)
        return
    with live_console() as console:
        directory = run(loaded, console=console, fresh=fresh, resume=resume)
    result = directory.result()
    training = result["training"]
    if training["steps"]:
        validation = f", validation loss {training['eval_loss']:.4f}" if "eval_loss" in training else ""
        out.print(
            f"\ntrained {training['steps']} steps, {training['trained_tokens']:,.0f} tokens in "
            f"{training['seconds']:.1f} s{validation}"
        )
    if result["evaluation"]:
        out.print(result_table("evaluation", result["evaluation"]))
    out.print(f"run directory: {directory.path}")
