"""Every recipe in the repository is valid as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from headgate.experiments.recipe_file import load_recipe

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(
    p for p in ROOT.rglob("*.yaml") if "accelerate" not in p.parts
)  # launch files are not recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name != "my-run", "give the recipe a name of its own"
