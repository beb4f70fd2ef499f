"""Where a recipe's data lies when only one path was given."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from headgate.data.config import SourceConfig
from headgate.experiments.recipe import Recipe

Source = TypeVar("Source", bound=SourceConfig)


def beside(train: SourceConfig, other: Source) -> Source:
    """``other`` with the training data's path, where both are of one source and only that path was given.

    Beside a training file ``train.jsonl``, split ``test`` is ``test.jsonl`` if it exists; otherwise the same
    file is read, which holds out rows for validation by their hash.
    """
    if other.path is not None or train.path is None or other.source != train.source:
        return other
    path = Path(train.path)
    if path.is_file():
        sibling = path.with_name(path.name.replace(train.split, other.split, 1))
        if other.split != train.split and sibling != path and sibling.exists():
            return other.model_copy(update={"path": str(sibling)})
    return other.model_copy(update={"path": train.path})


def with_paths(recipe: Recipe) -> Recipe:
    """The recipe with every path it implies written out."""
    train = recipe.data.train
    data = recipe.data
    if data.validation is not None:
        data = data.model_copy(update={"validation": beside(train, data.validation)})
    evaluation = [beside(train, task) for task in recipe.evaluation]
    return recipe.model_copy(update={"data": data, "evaluation": evaluation})
