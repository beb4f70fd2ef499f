"""Private members of other libraries: each exists in the installed version, and each stands in one file."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

import headgate
from headgate.models import private
from headgate.training.mixin import MethodsMixin
from headgate.training.trainer import HeadgateTrainer

ROOT = Path(headgate.__file__).parent
CLASSES = {
    "Trainer": Trainer,
    "Accelerator": Accelerator,
    "PretrainedConfig": PretrainedConfig,
    "BaseTunerLayer": BaseTunerLayer,
    "LoraLayer": LoraLayer,
    "PreTrainedModel": PreTrainedModel,
    "GradientCheckpointingLayer": GradientCheckpointingLayer,
}
ELSEWHERE = {name for names in private.READ.values() for name in names}
OURS = [kind for kind in HeadgateTrainer.__mro__ if kind.__module__.startswith("headgate.")]


@pytest.mark.parametrize("name", private.OVERRIDDEN)
def test_what_is_overridden_exists(name: str) -> None:
    assert inspect.isfunction(vars(Trainer)[name])


@pytest.mark.parametrize("owner,name", [(o, n) for o, names in private.READ.items() for n in names])
def test_what_is_read_exists(owner: str, name: str) -> None:
    """As an attribute of the class, or set somewhere in the module that defines it."""
    kind = CLASSES[owner]
    module = inspect.getsource(inspect.getmodule(kind))  # type: ignore[arg-type]
    everywhere = module if owner != "GradientCheckpointingLayer" else module + inspect.getsource(_modeling())
    assert hasattr(kind, name) or name in everywhere


def _modeling() -> object:
    from transformers import modeling_utils

    return modeling_utils


def test_no_override_is_left_out() -> None:
    """A private method of Trainer that one of our classes replaces is on the list, and the list holds no other."""
    replaced = {
        name
        for kind in OURS
        for name in vars(kind)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert replaced == set(private.OVERRIDDEN)


def test_private_members_stand_in_one_file() -> None:
    found = []
    for path in ROOT.rglob("*.py"):
        if path == Path(private.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ELSEWHERE:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.attr}")
    assert not found, found
    assert MethodsMixin in OURS
