"""What data a run reads: sources, skills of a continual stream, and how rows become batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from headgate.config import Seed, StrictConfig
from headgate.errors import ConfigError

Style = Literal["rationale", "answer"]
LossOn = Literal["completion", "assistant", "all"]
MIXTURE = "mixture"


class SourceConfig(StrictConfig):
    """Where rows come from and how they are read.

    ``source`` names a reader (``wordmath``, ``gsm8k``, ``alpaca``, ...: `headgate sources` lists them; ``auto`` looks
    at the columns) or a data set on the Hugging Face hub. ``path`` is a file, a glob, a folder with splits or shards,
    a saved data set, a hub cache's folder, or a hub name read with ``source``'s reader. ``split`` may carry a slice
    (``train[:1000]``).
    """

    source: str = "wordmath"
    path: str | None = None
    name: str | None = None  # a hub data set's configuration ("main")
    split: str = "train"
    style: Style = "rationale"
    limit: int | None = Field(default=None, gt=0)
    seed: Seed = 0
    revision: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """What the reader calls a column -> what the file calls it, or a template over the file's columns:
    ``{prompt: question, completion: "{answer} ({unit})"}``."""
    filter: dict[str, Any] = Field(default_factory=dict)
    """Only rows whose columns (as the file calls them) have this value, or one of these."""
    streaming: bool = False
    """Of the hub: read rows as they arrive instead of downloading the data set first; give a ``limit``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Per reader. All: ``prompt_template``, ``validation_share``, ``sample_seed`` (a random ``limit`` instead of the
    first rows). wordmath: ``families``, ``difficulty``, ``redundancy``, ``count``. text: ``separator``,
    ``chunk_characters`` (documents stay whole without it)."""
    mix: list[WeightedSource] = Field(default_factory=list)
    """Several sources, each row drawn from one with a chance in proportion to its weight. A list in place of a
    source means the same: ``train: [{source: gsm8k, weight: 3}, {source: text, path: a.txt, weight: 1}]``."""

    @model_validator(mode="before")
    @classmethod
    def _list_of_sources(cls, given: object) -> object:
        return {"source": MIXTURE, "mix": given} if isinstance(given, list) else given

    @model_validator(mode="after")
    def _mixture(self) -> SourceConfig:
        if (self.source == MIXTURE) != bool(self.mix):
            raise ValueError("a mixture is a list of sources with weights: name at least one")
        if any(part.mix for part in self.mix):
            raise ValueError("a mixture inside a mixture: list the sources side by side")
        return self


class WeightedSource(SourceConfig):
    """One source of a mixture. ``weight``: its share of the rows that are drawn, relative to the others'."""

    weight: float = Field(1.0, gt=0)


SourceConfig.model_rebuild()


class SkillConfig(SourceConfig):
    """One segment of a continual stream: rows trained on for ``steps`` optimizer steps."""

    skill: str
    steps: int | None = Field(default=None, gt=0)
    labelled: bool = True
    """False: the method is not told that a new skill begins here."""
    validation: SourceConfig | None = None
    validation_share: float = Field(0.05, gt=0, lt=1)
    """Share of the rows held out for ``eval_<skill>_loss`` where ``validation`` is not given."""


def check_returning_skills(stream: Sequence[SkillConfig]) -> None:
    """A skill that returns is the same skill: only its steps and its label may differ. Raises ConfigError."""
    first: dict[str, dict[str, Any]] = {}
    for position, skill in enumerate(stream):
        new = skill.model_dump(exclude={"steps", "labelled"})
        old = first.setdefault(skill.skill, new)
        changed = [key for key in old if old[key] != new[key]]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"data.stream.{position}: skill {skill.skill!r} returns with other data ({key}: {old[key]!r}, now "
                f"{new[key]!r}): give it the same data, or a name of its own"
            )


class ReplayConfig(StrictConfig):
    """Rows of earlier skills among those of the current one (experience replay)."""

    ratio: float = Field(0.1, gt=0, lt=1)
    """Chance that a row of a batch is a replayed one; batches stay as large as they were."""
    per_skill: int = Field(256, gt=0)
    """Rows kept of every earlier skill, drawn at random."""


class DataConfig(StrictConfig):
    """All of a recipe's ``data`` block."""

    train: SourceConfig = SourceConfig()
    """A source, or a list of them with weights."""
    validation: SourceConfig | None = SourceConfig(split="validation", limit=500)
    max_length: int = Field(default=512, ge=8, le=2**24)
    packing: bool = False
    loss_on: LossOn = "completion"
    group_by_length: bool = True
    mix_by: Literal["row", "batch"] = "row"
    """Of a mixture: every row is drawn from a source by itself, or a batch's rows all from one (logs by service)."""
    chat_template: str | None = None
    """Jinja text for rows of messages where the tokenizer has no template of its own."""
    long_prompts: Literal["error", "drop"] = "error"
    """A row whose prompt alone fills ``max_length``: an error that names it, or left out and counted."""
    overlap: Literal["error", "warn"] = "error"
    """What a problem that stands in two splits means."""
    stream: list[SkillConfig] | None = None
    stream_order: Literal["sequential", "joint"] = "sequential"
    """``joint``: the rows that the sequential run sees, shuffled into one stage: what no forgetting would give."""
    replay: ReplayConfig | None = None
    watch: dict[str, SourceConfig] = Field(default_factory=dict)
    """Of a stream: data that no segment trains on, validated with its skills as ``eval_<name>_loss``."""

    @field_validator("stream")
    @classmethod
    def _not_empty(cls, stream: list[SkillConfig] | None) -> list[SkillConfig] | None:
        if stream is not None and not stream:
            raise ValueError("stream is empty: list at least one skill or leave it null")
        return stream

    @model_validator(mode="after")
    def _stream_options(self) -> DataConfig:
        asked = {
            "replay": self.replay,
            "stream_order": self.stream_order != "sequential",
            "watch": self.watch,
        }
        for key in (key for key, value in asked.items() if value and not self.stream):
            raise ValueError(
                f"{key} is about the skills of a stream: list them under stream, or leave {key} out"
            )
        if self.mix_by == "batch" and not self.train.mix:
            raise ValueError("mix_by is about a mixture: list several sources under train, or leave it out")
        if self.mix_by == "batch" and self.group_by_length:
            raise ValueError(
                "mix_by: batch and group_by_length: true both say which rows share a batch: set one to its other value"
            )
        check_returning_skills(self.stream or [])
        for name in (skill.skill for skill in self.stream or [] if skill.skill in self.watch):
            raise ValueError(f"watch.{name}: the stream has a skill of that name, which is validated anyway")
        if self.replay is not None and self.stream_order == "joint":
            raise ValueError(
                "stream_order: joint shuffles all skills, so there is nothing to replay: drop replay"
            )
        return self

    @model_validator(mode="after")
    def _steps_all_or_none(self) -> DataConfig:
        given = [skill.steps is not None for skill in self.stream or []]
        if any(given) and not all(given):
            raise ValueError(
                "stream: give steps for every skill, or for none (then max_steps is shared equally)"
            )
        return self
