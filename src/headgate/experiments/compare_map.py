"""``compare.map``: one comparison, repeated in every cell of a grid: where does a method pay, and where not?

Every cell is a whole comparison (its arms, seeds, tuning and equal time), in a folder of its own below
``<output_dir>/<name>/``. The report of that folder draws all of them as one map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from headgate.config import file_name
from headgate.errors import ConfigError
from headgate.experiments.paths import with_paths
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import recipe_from, set_dotted
from headgate.experiments.sweep import combinations
from headgate.experiments.sweep_table import describe

NAME = "name"
"""The override that names a cell whose settings are too long to be its name."""


def map_folder(recipe: Recipe) -> Path:
    """Where the cells of a recipe with ``compare.map`` lie, and the report of all of them."""
    return Path(recipe.output_dir) / recipe.name


def cells(recipe: Recipe) -> Iterator[Recipe]:
    """One recipe a cell, in the order written: what the cell overrides, the comparison without its map.

    Raises ConfigError for a map without cells, a key or value that the recipe cannot take, and cells of one name.
    """
    assert recipe.compare is not None and recipe.compare.map is not None
    written = recipe.written()
    comparison = recipe.compare.model_dump(mode="json", exclude={"map"}, exclude_defaults=True)
    named: set[str] = set()
    for overrides in combinations(recipe.compare.map, "compare.map"):
        settings = {key: value for key, value in overrides.items() if key != NAME}
        name = _name(overrides, settings)
        if name in named:
            raise ConfigError(f"compare.map: two cells are called {name!r}: name each of them (name: ...)")
        named.add(name)
        content = {**written, "compare": comparison}
        for key, value in settings.items():
            set_dotted(content, key, value)
        content |= {"name": name, "output_dir": str(map_folder(recipe))}
        yield with_paths(recipe_from(content, f"compare.map, cell {name}"))


def _name(overrides: Mapping[str, object], settings: Mapping[str, object]) -> str:
    try:
        return file_name(str(overrides.get(NAME) or describe(settings)))
    except ValueError as error:
        raise ConfigError(
            f"compare.map: a cell's settings cannot be its name ({error}): add name: ..."
        ) from None
