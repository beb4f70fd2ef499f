"""Stage: a stretch of training with its own trainable groups, learning rates, schedule and data view."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from headgate.config import StrictConfig
from headgate.errors import ConfigError

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]
"""transformers' schedules that are a function of the step alone. The others ask for settings of their own (a lowest rate, a
length of decay) or for a metric, and cannot go on where a sub-stage begins."""
Rate = Annotated[float, Field(ge=0, le=100)]


class Stage(StrictConfig):
    """One stage of a curriculum, as data.

    ``train`` maps a parameter group to its peak learning rate; groups left out are frozen. The group
    ``lora`` is the adapter (or, with ``lora: null``, the whole model); every other group belongs to the
    method that hands it out. ``data`` names the view of the training data that the stage reads (a skill
    of a stream); None is the whole training set. ``options`` is the method's own, untouched by the trainer.
    """

    name: str
    share: float | None = Field(default=None, gt=0, le=1)
    steps: int | None = Field(default=None, ge=1)
    train: dict[str, Rate]
    warmup: float | None = Field(default=None, ge=0, le=1)
    lr_scheduler: Schedule | None = None
    data: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if self.share is not None and self.steps is not None:
            raise ValueError(f"stage {self.name!r} gives both share and steps: keep one")
        return self


@dataclass(frozen=True)
class ScheduledStage:
    """A stage with its place in the run: optimizer steps ``[start, stop)``."""

    stage: Stage
    index: int
    start: int
    stop: int

    @property
    def steps(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        return self.stage.name


LORA_GROUP = "lora"
"""The adapter, or with ``lora: null`` the whole model."""


def whole_run(learning_rate: float, more: Mapping[str, float] | None = None) -> list[Stage]:
    """The one stage of a run without a curriculum: the adapter, and ``more`` groups at their rates."""
    return [Stage(name="train", share=1.0, train={LORA_GROUP: learning_rate, **(more or {})})]


def schedule_stages(stages: Sequence[Stage], max_steps: int) -> list[ScheduledStage]:
    """Lay stages end to end over ``max_steps`` optimizer steps.

    Shares are rounded so that the stages fill the run exactly. Raises ConfigError when shares do not sum
    to 1, when steps do not sum to ``max_steps``, or when a stage would get no step.
    """
    if not stages:
        raise ConfigError("a run needs at least one stage")
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two stages are named {name!r}: stage names must differ")
    if all(stage.steps is not None for stage in stages):
        lengths = [stage.steps or 0 for stage in stages]
        if sum(lengths) != max_steps:
            raise ConfigError(
                f"the stages last {lengths} = {sum(lengths)} steps but the run lasts {max_steps}: "
                "set training.max_steps to their sum, or give shares"
            )
    elif any(stage.steps is not None for stage in stages):
        raise ConfigError("give every stage a share, or every stage a number of steps, not a mixture")
    else:
        shares = [stage.share if stage.share is not None else 1 / len(stages) for stage in stages]
        if abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(f"stage shares {shares} sum to {sum(shares):g}, not 1: adjust them")
        edges = [round(sum(shares[:i]) * max_steps) for i in range(len(shares))] + [max_steps]
        lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    scheduled, start = [], 0
    for index, (stage, length) in enumerate(zip(stages, lengths, strict=True)):
        if length < 1 and max_steps > 0:
            raise ConfigError(
                f"stage {stage.name!r} is too short for one optimizer step "
                f"(share {stage.share} of {max_steps} steps): raise training.max_steps or the share"
            )
        scheduled.append(ScheduledStage(stage, index, start, start + length))
        start += length
    return scheduled
