"""One entry of a recipe's ``evaluation`` list."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from headgate.data.config import SourceConfig


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
    do_sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    samples_per_item: int = Field(default=1, ge=1)
    routing: str | None = None
    label: str | None = None

    @property
    def key(self) -> str:
        """What its results are stored under: the label, or the task and its source."""
        return self.label or (
            self.task if self.task in ("mbpp", "humaneval") else f"{self.task}_{self.source}"
        )

    def source_config(self) -> SourceConfig:
        """The data part alone."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in SourceConfig.model_fields}
        return SourceConfig(**fields)
