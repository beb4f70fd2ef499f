"""A continual stream: skills one after another, each with its own training and validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from headgate.errors import ConfigError

from .config import SkillConfig, SourceConfig, check_returning_skills
from .contamination import Overlap, check_disjoint
from .sources import load_rows, split_rows


@dataclass(frozen=True)
class SkillData:
    """One segment of the stream. ``name`` is unique; a recurring skill gets ``name#2``, ``name#3``."""

    name: str
    skill: str
    train: datasets.Dataset
    validation: datasets.Dataset
    steps: int
    labelled: bool


def load_stream(
    skills: Sequence[SkillConfig], max_steps: int | None = None, overlap: Overlap = "error"
) -> list[SkillData]:
    """The segments in order. Without steps of their own they share ``max_steps`` equally.

    A skill without ``validation`` holds out ``validation_share`` of its rows by a hash of the row. A skill that
    recurs sees the same rows and the same validation. Raises ConfigError for one name with two sources.
    """
    check_returning_skills(skills)
    segments: list[SkillData] = []
    for position, config in enumerate(skills):
        occurrence = 1 + sum(segment.skill == config.skill for segment in segments)
        name = config.skill if occurrence == 1 else f"{config.skill}#{occurrence}"
        if occurrence == 1:
            train, validation = _rows(config, overlap)
        else:
            earlier = next(segment for segment in segments if segment.skill == config.skill)
            train, validation = earlier.train, earlier.validation
        steps = config.steps
        if steps is None:
            if max_steps is None:
                raise ConfigError(
                    f"data.stream: skill '{config.skill}' has no steps and training.max_steps is not set"
                )
            if max_steps < len(skills):
                raise ConfigError(
                    f"data.stream: {len(skills)} skills cannot share training.max_steps={max_steps}: give each its steps"
                )
            steps = max_steps * (position + 1) // len(skills) - max_steps * position // len(skills)
        segments.append(SkillData(name, config.skill, train, validation, steps, config.labelled))
    return segments


def _rows(config: SkillConfig, overlap: Overlap) -> tuple[datasets.Dataset, datasets.Dataset]:
    source = SourceConfig(**{key: getattr(config, key) for key in SourceConfig.model_fields})
    if config.validation is not None:
        train, validation = load_rows(source), load_rows(config.validation)
    else:
        train, validation = split_rows(load_rows(source), config.validation_share)
    check_disjoint(train, validation, overlap=overlap, name=f"{config.skill} validation")
    return train, validation
