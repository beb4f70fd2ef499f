"""Whose loss is trained: the model's own cross-entropy, or that of a trainer which computes its own.

A trainer under ``MethodsMixin`` may override ``compute_loss`` (SFTTrainer, a weighted loss of one's own) or be given a
``compute_loss_func``: then that loss is what is trained. Objectives over other batches (preferences, rewards, groups of
samples) are refused by name: a gate or a router on them has no meaning that anybody has written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import Trainer

from headgate.errors import ConfigError
from headgate.methods.compose import MethodStack
from headgate.methods.step import Step
from headgate.models.surgery import head_input_captured
from headgate.training import processes
from headgate.training.config import LossChoice
from headgate.training.loss import TaskLoss, choose_loss, chunked_loss, plain_loss

if TYPE_CHECKING:
    from headgate.training.mixin import MethodsMixin

SUPERVISED = frozenset({"SFTTrainer"})
"""The trainers of TRL whose objective is next-token cross-entropy on labelled tokens."""


def objective_override(trainer: MethodsMixin, ours: Sequence[type]) -> str | None:
    """The name of what replaces the model's own loss in ``trainer``, or None.

    ``ours``: Headgate's classes, whose ``compute_loss`` only filters inputs. Raises ConfigError for an objective that
    is not supervised.
    """
    for kind in type(trainer).__mro__:
        if kind.__module__.startswith("trl.") and kind.__name__.endswith("Trainer"):
            if kind.__name__ not in SUPERVISED and not kind.__name__.startswith("_"):
                raise ConfigError(
                    f"{type(trainer).__name__}: {kind.__name__} trains another objective than next-token cross-entropy; "
                    "Headgate's methods are defined for supervised training only: use SFTTrainer or transformers.Trainer"
                )
            break
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func"
    for kind in type(trainer).__mro__:
        if "compute_loss" in vars(kind) and kind is not Trainer and kind not in ours:
            return f"{kind.__name__}.compute_loss"
    return None


def check_override(override: str, methods: MethodStack, loss: str, label_smoothing: float) -> None:
    """Raise ConfigError where something asks for Headgate's own loss, which the override replaces."""
    reading = methods.observing_head
    if reading:
        raise ConfigError(
            f"{reading[0]} reads the head's errors from Headgate's own loss, and {override} replaces that loss: "
            f"leave one of them out"
        )
    if loss == "chunked" or label_smoothing:
        asked = "loss='chunked'" if loss == "chunked" else f"label_smoothing={label_smoothing:g}"
        raise ConfigError(
            f"{asked} is Headgate's own loss, and {override} replaces it: leave one of them out"
        )


class Objective:
    """The loss that a trainer trains: chosen once, asked for at every micro-batch.

    Attributes:
        override: what replaces Headgate's loss, by name, or None. choice: ``plain`` or ``chunked``.
    """

    def __init__(self, trainer: MethodsMixin, ours: type, loss: LossChoice, label_smoothing: float) -> None:
        self._trainer = trainer
        self.label_smoothing = label_smoothing
        self.override = objective_override(trainer, (ours,))
        if self.override is not None:
            check_override(self.override, trainer.methods, loss, label_smoothing)
            loss = "plain"
        observed = bool(trainer.methods.observing_head)
        self.choice = choose_loss(loss, trainer.anatomy, label_smoothing, observed)

    def task_loss(self, step: Step) -> TaskLoss:
        """Forward of the step's batch; the loss divided as it enters the backward, by the window."""
        trainer, num_items = self._trainer, step.window_tokens
        if self.override is not None:
            return self._overridden(step, self.override)
        inputs = trainer.model_inputs(step.batch)
        if num_items is not None and trainer.model_accepts_loss_kwargs:
            inputs["num_items_in_batch"] = num_items
        if self.choice == "plain":
            task = plain_loss(step.model, trainer.anatomy, inputs)
        else:
            observers = trainer.methods.head_observers(step)
            task = chunked_loss(
                step.model,
                trainer.anatomy,
                inputs,
                num_items=num_items,
                label_smoothing=self.label_smoothing,
                observers=observers,
                gated=bool(observers),
            )
        if num_items is None:
            task.loss = task.loss / step.window_size
        elif trainer.args.average_tokens_across_devices:
            task.loss = task.loss * processes.world_size()
        return task

    def _overridden(self, step: Step, override: str) -> TaskLoss:
        """The loss of a trainer that computes its own, scaled as transformers.Trainer.training_step scales it."""
        trainer, num_items = self._trainer, step.window_tokens
        own = {*trainer.methods.columns(), "segment_ids", "example_id"}
        inputs = {name: value for name, value in step.batch.items() if name not in own}
        with head_input_captured(trainer.anatomy.head) as captured:
            loss = trainer.compute_loss(step.model, inputs, num_items_in_batch=num_items)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ConfigError(
                f"{override} returned {type(loss).__name__}, not one loss: return a scalar tensor"
            )
        if not captured and trainer.methods.reading_hidden:
            raise ConfigError(
                f"{trainer.methods.reading_hidden[0]} reads what enters the language-model head, and {override} computes "
                "its loss without calling the head: use HeadgateTrainer, or switch off what reads it (kd)"
            )
        by_tokens = num_items is not None and trainer.model_accepts_loss_kwargs
        if not by_tokens and trainer.compute_loss_func is None:
            loss = loss / step.window_size
        return TaskLoss(loss.reshape(()), captured[-1] if captured else None, None, None)
