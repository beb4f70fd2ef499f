"""Headgate: routed and gated fine-tuning of language models, with the evidence."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "headgate.models.load",
    "HeadgateTrainer": "headgate.training.trainer",
    "MethodsMixin": "headgate.training.mixin",
    "Method": "headgate.methods.base",
    "Stage": "headgate.methods.stage",
    "Step": "headgate.methods.step",
    "SchemaBank": "headgate.methods.schema_bank",
    "BackwardGate": "headgate.methods.backward_gate",
    "LayerRouting": "headgate.methods.layer_routing",
    "LoraExperts": "headgate.methods.lora_experts",
    "load": "headgate.training.saved",
    "load_method": "headgate.training.saved",
    "attached": "headgate.training.saved",
    "train": "headgate.experiments.results",
    "compare": "headgate.experiments.results",
    "open_results": "headgate.experiments.results",
    "RunResult": "headgate.experiments.results",
    "ComparisonResult": "headgate.experiments.results",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from headgate.experiments.results import ComparisonResult as ComparisonResult
    from headgate.experiments.results import RunResult as RunResult
    from headgate.experiments.results import compare as compare
    from headgate.experiments.results import open_results as open_results
    from headgate.experiments.results import train as train
    from headgate.methods.base import Method as Method
    from headgate.methods.stage import Stage as Stage
    from headgate.methods.step import Step as Step
    from headgate.models.load import load_model as load_model
    from headgate.training.mixin import MethodsMixin as MethodsMixin
    from headgate.training.saved import attached as attached
    from headgate.training.saved import load as load
    from headgate.training.saved import load_method as load_method
    from headgate.training.trainer import HeadgateTrainer as HeadgateTrainer


def __dir__() -> list[str]:
    """The public names, imported or not, for completion."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: ``import headgate`` itself stays fast."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'headgate' has no attribute {name!r}")
