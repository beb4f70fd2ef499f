"""Whose loss is trained: the model's own cross-entropy, or that of a trainer which computes its own.

A trainer under ``MethodsMixin`` may override ``compute_loss`` (SFTTrainer, a weighted loss of one's own) or be given a
``compute_loss_func``: then that loss is what is trained. Objectives over other batches (preferences, rewards, groups of
samples) are refused by name: a gate or a router on them has no meaning that anybody has written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from headgate.errors import ConfigError
from headgate.methods.compose import MethodStack

SUPERVISED = frozenset({"SFTTrainer"})
"""The trainers of TRL whose objective is next-token cross-entropy on labelled tokens."""


def objective_override(trainer: Any, ours: Sequence[type]) -> str | None:
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
