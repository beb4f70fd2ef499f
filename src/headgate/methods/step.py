"""Step: what a Method may see of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from headgate.methods.stage import ScheduledStage
from headgate.models.anatomy import Batch
from headgate.ops.randomness import generator

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

    from headgate.methods.stage import Stage

IGNORE_INDEX = -100


class ForwardStopped(Exception):
    """Raised inside a forward when a method rejects the micro-batch half-way; the trainer catches it."""


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """``[B, T]`` bool: no padding."""
    if batch.get("attention_mask") is not None:
        return torch.as_tensor(batch["attention_mask"]).bool()
    if batch.get("segment_ids") is not None:
        return torch.as_tensor(batch["segment_ids"]) >= 0
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


@dataclass
class Step:
    """One micro-batch, filled in as it proceeds: batch, then hidden / logits / task loss, then the decision.

    Attributes:
        phase: ``batch`` (before the forward), ``partial`` (inside it), ``forward`` (after the task loss),
            ``done`` (after the decision).
        batch: what the collator made, extra columns included (``tags``, ``example_id``).
        scheduled: the stage and its place in the run.
        global_step: optimizer step of the run, from 0. stage_step: the same within the stage.
        micro_step: a counter unique per micro-batch over all ranks, monotone, restored on resume.
        window_index, window_size: place in the gradient accumulation window; the last one synchronises.
        seed: the run's seed. max_steps: optimizer steps of the run. epoch: epochs done, a float.
        model: the model called by the trainer (PEFT wrapper included).
        hidden: ``[B, T, H]`` input of the language-model head; logits: ``[B, T, V]`` or None when the loss
            is chunked; task_loss: mean over the micro-batch's trained tokens, detached; raw_loss: the same
            divided as it enters the backward (by the window's tokens).
        num_tokens: trained (labelled, shifted) tokens of this micro-batch; window_tokens: of its window.
        accepted: the combined decision, from phase ``done`` on.
        should_log: whether telemetry of this step is read; costly statistics can wait for it.
        sum_across_ranks: sums a tensor over data-parallel ranks (identity on one).
    """

    batch: Batch
    scheduled: ScheduledStage
    global_step: int
    micro_step: int
    seed: int
    max_steps: int
    model: torch.nn.Module
    window_index: int = 0
    window_size: int = 1
    epoch: float = 0.0
    phase: Literal["batch", "partial", "forward", "done"] = "batch"
    hidden: Tensor | None = None
    logits: Tensor | None = None
    outputs: ModelOutput | None = None
    task_loss: Tensor | None = None
    raw_loss: Tensor | None = None
    num_tokens: Tensor | int = 0
    window_tokens: Tensor | int | None = None
    accepted: bool = True
    should_log: bool = False
    sum_across_ranks: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)

    @property
    def stage(self) -> Stage:
        return self.scheduled.stage

    @property
    def stage_step(self) -> int:
        return self.global_step - self.scheduled.start

    @property
    def stage_steps(self) -> int:
        return self.scheduled.steps

    @property
    def is_window_start(self) -> bool:
        return self.window_index == 0

    @property
    def is_window_end(self) -> bool:
        return self.window_index == self.window_size - 1

    @property
    def labels(self) -> Tensor:
        labels: Tensor = self.batch["labels"]
        return labels

    @property
    def valid(self) -> Tensor:
        """``[B, T]`` bool: real tokens, no padding."""
        return real_tokens(self.batch)

    @property
    def segment_ids(self) -> Tensor | None:
        """``[B, T]`` document number within its row (-1 on padding), or None where a row is a document."""
        return self.batch.get("segment_ids")

    def generator(self, purpose: str) -> torch.Generator:
        """The random stream of ``purpose`` at this micro-batch."""
        return generator(self.seed, self.micro_step, purpose)
