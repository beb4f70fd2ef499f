"""The ``training`` block of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from headgate.config import StrictConfig
from headgate.methods.stage import Schedule, Stage

LossChoice = Literal["auto", "plain", "chunked"]
ScheduleClock = Literal["offered", "accepted"]
Interval = Annotated[int, Field(strict=True, gt=0)] | Annotated[float, Field(gt=0)]
"""An integer is a number of optimizer steps, a float up to 1.0 a share of the run."""


class EarlyStopping(StrictConfig):
    """Stop when ``metric`` has not improved for ``patience`` evaluations; the best checkpoint is then the result."""

    metric: str = "eval_loss"
    patience: int = Field(default=5, ge=1)


class TrainingConfig(StrictConfig):
    """How long, how fast, on which clock. Names follow transformers.TrainingArguments where it has one."""

    epochs: float | None = Field(default=None, gt=0, le=1e6)
    max_steps: int | None = Field(default=None, ge=0, le=2**31)
    per_device_train_batch_size: int = Field(default=4, ge=1, le=2**20)
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=2**20)
    learning_rate: float = Field(default=1e-4, gt=0, le=100)
    lr_scheduler: Schedule = "linear"
    warmup: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    loss: LossChoice = "auto"
    schedule_clock: ScheduleClock = "offered"
    early_stopping: EarlyStopping | None = None
    eval_every: Interval = 0.1
    save_every: Interval = 0.1
    deterministic: bool = True
    stages: list[Stage] | None = None

    @field_validator("eval_every", "save_every")
    @classmethod
    def _share_or_steps(cls, every: float) -> float:
        if every > 1 and every != int(every):
            raise ValueError(f"{every:g} is neither a share of the run (up to 1.0) nor a number of steps")
        return every

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give one of epochs and max_steps, not both")
        return self

    def interval(self, every: float, max_steps: int) -> int:
        """``eval_every`` / ``save_every`` in optimizer steps: a float up to 1.0 is a share of the run, else steps."""
        return max(1, round(every * max_steps)) if isinstance(every, float) and every <= 1 else int(every)
