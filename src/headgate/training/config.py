"""The ``training`` block of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from headgate.config import StrictConfig
from headgate.methods.stage import Stage
from headgate.training.precision import Optimizer, Precision, Scheduler, check_arguments

LossChoice = Literal["auto", "plain", "chunked"]
ScheduleClock = Literal["offered", "accepted"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Interval = Annotated[int, Field(strict=True, gt=0)] | Annotated[float, Field(gt=0)]
"""An integer is a number of optimizer steps, a float up to 1.0 a share of the run."""


class EarlyStopping(StrictConfig):
    """Stop when ``metric`` has not improved for ``patience`` evaluations; the best checkpoint is then the result."""

    metric: str = "eval_loss"
    patience: int = Field(default=5, ge=1)


class TrainingConfig(StrictConfig):
    """How long, how fast, on which clock. Names follow transformers.TrainingArguments where it has one.

    ``precision``: of the arithmetic, whatever the launcher says: ``bf16`` and ``fp16`` are autocast, ``auto`` computes as
    ``model.dtype`` says, ``fp32`` asks for a base in float32 too. ``per_device_eval_batch_size`` None: at least 16.
    """

    epochs: float | None = Field(default=None, gt=0, le=1e6)
    max_steps: int | None = Field(default=None, ge=0, le=2**31)
    per_device_train_batch_size: int = Field(default=4, ge=1, le=2**20)
    per_device_eval_batch_size: int | None = Field(default=None, ge=1, le=2**20)
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=2**20)
    dataloader_workers: int = Field(default=0, ge=0, le=1024)
    learning_rate: float = Field(default=1e-4, gt=0, le=100)
    precision: Precision = "auto"
    optimizer: Optimizer = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    lr_scheduler: Scheduler = "linear"
    lr_scheduler_args: dict[str, Any] = Field(default_factory=dict)
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
    def _arguments_of_the_scheduler(self) -> TrainingConfig:
        check_arguments(self.lr_scheduler, self.lr_scheduler_args)
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give one of epochs and max_steps, not both")
        return self

    def interval(self, every: float, max_steps: int) -> int:
        """``eval_every`` / ``save_every`` in optimizer steps: a float up to 1.0 is a share of the run, else steps."""
        return max(1, round(every * max_steps)) if isinstance(every, float) and every <= 1 else int(every)
