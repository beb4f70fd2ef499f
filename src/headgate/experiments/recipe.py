"""The recipe: everything a run needs, strict and typed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping

from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from headgate.config import FileName, Seed, StrictConfig, build_config
from headgate.data.config import DataConfig
from headgate.evaluation.config import EvalTask
from headgate.experiments.records import Content
from headgate.methods.names import config_class
from headgate.models.config import LoraConfig, ModelConfig
from headgate.training.config import TrainingConfig

TRACKERS = ("jsonl", "tensorboard", "trackio", "wandb")


class TuneConfig(StrictConfig):
    """Learning-rate (or any other) tuning before a comparison: equal for every arm, chosen on validation.

    ``metric`` is one of ``training``'s in the result, or a stream's ``continual.average``. ``overrides`` hold in the
    tuning runs alone: where a stream's validation rows are what is reported, tuning wants other rows.
    """

    arms: str | list[str] = "all"
    key: str = "training.learning_rate"
    values: list[object]
    seed: Seed = 7
    metric: str = "eval_loss"
    overrides: dict[str, object] = Field(default_factory=dict)


class SweepConfig(StrictConfig):
    """A grid over dotted keys, or an explicit list of overrides."""

    grid: dict[str, list[object]] = Field(default_factory=dict)
    runs: list[dict[str, object]] = Field(default_factory=list)


class CompareConfig(StrictConfig):
    """Arms x seeds. An arm overrides the recipe; its ``methods`` names exactly the methods that run in it.

    An arm with ``equal_time: other`` trains for as many steps as fit in that other arm's measured time.
    An arm with ``replay_of: other`` is a random gate that accepts exactly as many micro-batches as that arm did at each seed.
    ``contrasts`` lists pairs of arms to set against each other, besides every arm against the baseline.
    ``map``: the whole comparison again in every cell of a grid (or list) of overrides, drawn as one map.
    """

    seeds: list[Seed] = Field(default_factory=lambda: [42, 123, 456], min_length=1)
    arms: dict[str, dict[str, object]]
    tune: TuneConfig | None = None
    baseline: str | None = None
    metric: str | None = None
    contrasts: list[tuple[str, str]] = Field(default_factory=list)
    map: SweepConfig | None = None

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            raise ValueError(f"seed {twice[0]} stands twice: a run counts once, list distinct seeds")
        return seeds


class Recipe(StrictConfig):
    """One experiment. See docs/recipes.md for every key."""

    base: str | None = None
    name: FileName = "my-run"
    seed: Seed = 42
    output_dir: str = "runs"
    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig | None = Field(default_factory=LoraConfig)
    data: DataConfig = DataConfig()
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    entry: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """``module:name``: a function or a transformers.Trainer class that trains instead of Headgate's trainer."""
    methods: dict[str, dict[str, object]] = Field(default_factory=dict)
    evaluation: list[EvalTask] = Field(default_factory=list)
    report_to: list[str] = Field(default_factory=lambda: ["jsonl"])
    logging_every: int = Field(default=10, ge=1)
    compare: CompareConfig | None = None
    sweep: SweepConfig | None = None
    _written: Content | None = PrivateAttr(default=None)

    def model_copy(self, *, update: Mapping[str, object] | None = None, deep: bool = False) -> Recipe:
        changed = super().model_copy(update=update, deep=deep)
        if update:
            changed._written = None
        return changed

    def __eq__(self, other: object) -> bool:
        """Equal content, whichever way it was written."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # holds mappings

    def written(self) -> Content:
        """What was written, without ``compare`` and ``sweep``: what an arm or a sweep's run overrides.

        A method block keeps only the keys that the user gave, so that an override may change its preset. A recipe
        that was not read from a mapping gives its resolved content.
        """
        content = self.model_dump(mode="json") if self._written is None else copy.deepcopy(self._written)
        return {key: value for key, value in content.items() if key not in ("base", "compare", "sweep")}

    @field_validator("methods", mode="after")
    @classmethod
    def _known_methods(cls, methods: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        """Method blocks are completed with that method's defaults."""
        resolved = {}
        for name, options in methods.items():
            config = build_config(config_class(name), options or {}, where=f"methods.{name}")
            resolved[name] = config.model_dump(mode="json")
        return resolved

    @model_validator(mode="before")
    @classmethod
    def _one_precision(cls, content: object) -> object:
        """The base is loaded in what the arithmetic needs. It is the recipe that says so: verification loads it again."""
        if not isinstance(content, dict):
            return content
        blocks = {key: content.get(key) or {} for key in ("training", "model")}
        plain = {
            k: b.model_dump(exclude_unset=True) if isinstance(b, BaseModel) else b for k, b in blocks.items()
        }
        if not all(isinstance(block, Mapping) for block in plain.values()):
            return content
        precision, dtype = plain["training"].get("precision"), plain["model"].get("dtype", "auto")
        if precision == "fp32" and dtype not in ("auto", "float32"):
            raise ValueError(
                f"training.precision=fp32 and model.dtype={dtype} contradict each other: drop one of them"
            )
        if precision in ("fp32", "fp16") and dtype == "auto":  # fp16's scaler steps on float32 weights
            return {**content, "model": {**plain["model"], "dtype": "float32"}}
        return content

    @field_validator("report_to", mode="after")
    @classmethod
    def _known_trackers(cls, trackers: list[str]) -> list[str]:
        unknown = [tracker for tracker in trackers if tracker not in TRACKERS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no tracker: choose from {', '.join(TRACKERS)}")
        return trackers

    @property
    def steps_given(self) -> int | None:
        """Optimizer steps where the recipe fixes them: max_steps, or the stream's sum; None with epochs."""
        if self.data.stream and self.training.max_steps != 0:
            steps = [skill.steps for skill in self.data.stream]
            if None not in steps:
                return sum(step or 0 for step in steps)
        if self.training.epochs is not None:
            return None
        return 200 if self.training.max_steps is None else self.training.max_steps

    @property
    def validation_batch_size(self) -> int:
        """Rows of a validation batch: as given, or (they need no gradients) at least 16."""
        return self.training.per_device_eval_batch_size or max(16, self.training.per_device_train_batch_size)

    def identity(self) -> dict[str, object]:
        """What makes a run this run: all but output, reporting, logging and device settings."""
        content = self.model_dump(
            mode="json",
            exclude={"base", "name", "output_dir", "report_to", "logging_every", "compare", "sweep"},
            exclude_defaults=True,  # a key that a later version adds, at its default, names the same work
        )
        for place in ("device", "parallel"):
            content.get("model", {}).pop(place, None)
        content["model"] = content.get("model", {})
        content["methods"] = {
            name: build_config(config_class(name), options).model_dump(mode="json", exclude_defaults=True)
            for name, options in self.methods.items()
        }
        return content

    def run_id(self) -> str:
        """Short hash of ``identity``: the same work has the same id wherever it runs."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return f"{hashlib.sha256(canonical.encode()).hexdigest()[:10]}-s{self.seed}"
