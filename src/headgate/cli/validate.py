"""``headgate validate RECIPE``: check a recipe without loading a model, and print the plan."""

from __future__ import annotations

from headgate.cli.console import out
from headgate.cli.options import RecipeArgument, SetOption
from headgate.experiments.plan import plan
from headgate.experiments.recipe_file import aliases_used, load_recipe


def validate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Check a recipe without loading a model, and print what it would do."""
    loaded = load_recipe(recipe, overrides or [])
    out.print(plan(loaded, aliases_used(recipe)))
    out.print("valid")
