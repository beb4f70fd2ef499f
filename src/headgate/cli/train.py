"""``headgate train RECIPE``: the plan, the run, the table."""

from __future__ import annotations

from typing import Annotated

import typer

from headgate.cli.console import live_console, out, result_table
from headgate.cli.options import RecipeArgument, SetOption
from headgate.experiments.plan import plan
from headgate.experiments.recipe_file import aliases_used, load_recipe
from headgate.experiments.run import run


def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Demand a checkpoint to resume from.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, deleting this recipe's run.")] = False,
) -> None:
    """Train, evaluate, and write a run directory. A partial run resumes where it stopped."""
    loaded = load_recipe(recipe, overrides or [])
    out.print(plan(loaded, aliases_used(recipe)))
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
