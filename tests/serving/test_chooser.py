"""Does a text alone say who should answer it? On the skills of the shipped streams, each with an expert of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import headgate
from headgate.data.contamination import asked
from headgate.data.streams import load_stream
from headgate.experiments.chosen import TRAIN_ROWS, VALIDATION_ROWS, log_probabilities
from headgate.experiments.recipe_file import load_recipe
from headgate.serving.chooser import choose

RECIPES = Path(headgate.__file__).parent / "recipes" / "lora_experts"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "skills"), [("retention", 6), ("real_stream", 5)])
def test_skills_are_told_apart(name: str, skills: int) -> None:
    """At least 95% of the validation rows of every skill go to its expert, by a chooser that saw training prompts alone."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    segments = {}
    for segment in load_stream(recipe.data.stream, recipe.training.max_steps, recipe.data.overlap):
        segments.setdefault(segment.skill, segment)
    assert len(segments) == skills
    entries = [{"skill": skill, "adapter": skill} for skill in segments]
    texts = [
        [asked(row) for row in segment.train.select(range(min(TRAIN_ROWS, len(segment.train))))]
        for segment in segments.values()
    ]
    loaded = entries, log_probabilities(texts).tolist()
    right = {}
    for skill, segment in segments.items():
        rows = segment.validation.select(range(min(VALIDATION_ROWS, len(segment.validation))))
        right[skill] = sum(choose(asked(row), loaded) == skill for row in rows) / len(rows)
    print(name, right)
    assert min(right.values()) >= 0.95, right
