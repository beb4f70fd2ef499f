"""What data a run reads: sources, skills of a continual stream, and how rows become batches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from headgate.config import StrictConfig

Style = Literal["rationale", "answer"]
LossOn = Literal["completion", "assistant", "all"]


class SourceConfig(StrictConfig):
    """Where rows come from and how they are read.

    ``source`` names a reader (``wordmath``, ``gsm8k``, ``alpaca``, ...; ``auto`` looks at the columns) or a data
    set on the Hugging Face hub; ``path`` is a local file, a folder searched for ``<split>.jsonl|parquet|...``, or
    a hub name read with ``source``'s reader. ``split`` may carry a hub slice (``train[:1000]``).
    """

    source: str = "wordmath"
    path: str | None = None
    name: str | None = None  # a hub data set's configuration ("main")
    split: str = "train"
    style: Style = "rationale"
    limit: int | None = Field(default=None, gt=0)
    seed: int = 0
    revision: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Per reader. All: ``prompt_template``, ``validation_share``, ``sample_seed`` (a random ``limit`` instead of the
    first rows). wordmath: ``families``, ``difficulty``, ``redundancy``, ``count``. text: ``separator``,
    ``chunk_characters``."""


class SkillConfig(SourceConfig):
    """One segment of a continual stream: rows trained on for ``steps`` optimizer steps."""

    skill: str
    steps: int | None = Field(default=None, gt=0)
    labelled: bool = True
    """False: the method is not told that a new skill begins here."""
    validation: SourceConfig | None = None
    validation_share: float = Field(0.05, gt=0, lt=1)
    """Share of the rows held out for ``eval_<skill>_loss`` where ``validation`` is not given."""


class DataConfig(StrictConfig):
    """All of a recipe's ``data`` block."""

    train: SourceConfig = SourceConfig()
    validation: SourceConfig | None = SourceConfig(split="validation", limit=500)
    max_length: int = Field(512, ge=8)
    packing: bool = False
    loss_on: LossOn = "completion"
    group_by_length: bool = True
    chat_template: str | None = None
    """Jinja text for rows of messages where the tokenizer has no template of its own."""
    long_prompts: Literal["error", "drop"] = "error"
    """A row whose prompt alone fills ``max_length``: an error that names it, or left out and counted."""
    overlap: Literal["error", "warn"] = "error"
    """What a problem that stands in two splits means."""
    stream: list[SkillConfig] | None = None

    @field_validator("stream")
    @classmethod
    def _not_empty(cls, stream: list[SkillConfig] | None) -> list[SkillConfig] | None:
        if stream is not None and not stream:
            raise ValueError("stream is empty: list at least one skill or leave it null")
        return stream

    @model_validator(mode="after")
    def _steps_all_or_none(self) -> DataConfig:
        given = [skill.steps is not None for skill in self.stream or []]
        if any(given) and not all(given):
            raise ValueError(
                "stream: give steps for every skill, or for none (then max_steps is shared equally)"
            )
        return self
