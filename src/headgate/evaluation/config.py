"""One entry of a recipe's ``evaluation`` list."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from headgate.config import FileName
from headgate.data.config import SourceConfig
from headgate.evaluation.sandbox import REFUSAL

CODE_TASKS = ("mbpp", "humaneval")


class EvalTask(SourceConfig):
    """A task and the data it is measured on.

    ``task``: exact_match, gsm8k, perplexity, mbpp, humaneval, or the name of an lm-evaluation-harness task.
    """

    task: str = "exact_match"
    split: str = "test"
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lengths: list[int] = Field(default_factory=lambda: [512])
    few_shot: int = Field(default=0, ge=0)
    scorer: Literal["strict", "flexible", "first_number", "last_integer", "boxed", "math_verify"] | None = (
        None
    )
    """The one that ``accuracy`` reports; default: strict for rationales, flexible for bare answers."""
    do_sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples_per_item: int = Field(default=1, ge=1)
    k: list[int] = Field(default_factory=lambda: [1])
    """pass@k for these k; each needs ``samples_per_item`` of at least k."""
    allow_code_execution: bool = False
    """Programs that a model wrote are only run when this says so."""
    code_seconds: float = Field(default=5.0, gt=0)
    windows: Literal["rows", "disjoint", "sliding"] = "rows"
    """Perplexity over rows cut at each length, or over the joined text in windows of that length."""
    stride: int | None = Field(default=None, ge=1)
    """Of sliding windows; default: half the length."""
    routing: str | None = None
    label: FileName | None = None

    @model_validator(mode="after")
    def _possible(self) -> EvalTask:
        if self.task in CODE_TASKS and not self.allow_code_execution:
            raise ValueError(REFUSAL)
        if any(not 1 <= k <= self.samples_per_item for k in self.k):
            raise ValueError(
                f"k={self.k} needs samples_per_item of at least {max(self.k)}, it is {self.samples_per_item}: raise it"
            )
        if self.samples_per_item > 1 and not self.do_sample:
            raise ValueError(
                f"samples_per_item={self.samples_per_item} greedy samples would all be equal: set do_sample: true"
            )
        if any(length < 2 for length in self.lengths):
            raise ValueError(f"lengths={self.lengths}: a window needs at least two tokens")
        return self

    @property
    def key(self) -> str:
        """What its results are stored under: the label, or the task and its source."""
        return self.label or (self.task if self.task in CODE_TASKS else f"{self.task}_{self.source}").replace(
            "/", "_"
        )

    def source_config(self) -> SourceConfig:
        """The data part alone."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in SourceConfig.model_fields}
        return SourceConfig(**fields)
