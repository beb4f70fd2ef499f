"""Load what a run saved: adapter, methods' state, routing live where it was trained to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgate.errors import CheckpointError
from headgate.methods.base import Method
from headgate.methods.compose import MethodStack
from headgate.models.adapters import load_adapter
from headgate.models.anatomy import describe
from headgate.models.config import ModelConfig
from headgate.models.load import load_base
from headgate.training import checkpoint

if TYPE_CHECKING:
    from torch import nn


def saved_folder(path: str | Path) -> Path:
    """The folder that holds ``headgate.json``: the path itself, or the ``checkpoint`` of a run directory."""
    path = Path(path)
    for folder in (path, path / "checkpoint"):
        if (folder / checkpoint.STRUCTURE_FILE).exists():
            return folder
    raise CheckpointError(
        f"{path} holds no saved Headgate model (no {checkpoint.STRUCTURE_FILE} there or in checkpoint/): "
        "give a run directory or its checkpoint folder"
    )


def load(path: str | Path, *, attach: bool = True, **model_options: Any) -> tuple[Any, Any]:
    """Base model, adapter and methods of a saved run.

    Args:
        path: a run directory, its ``checkpoint`` folder, or what ``HeadgateTrainer.save_model`` wrote.
        attach: whether the saved methods are installed; ``model.headgate_methods`` holds them.
        model_options: keys of the recipe's ``model`` block (``device``, ``dtype``, ``name_or_path``...).

    Raises CheckpointError or ModelError; never falls back to the bare base model.
    """
    folder = saved_folder(path)
    description = checkpoint.read_description(folder)
    base = {**description["model"], **model_options}
    if not base.get("name_or_path"):
        raise CheckpointError(
            f"{folder} was trained on a model without a name: say where its base lies, load(path, name_or_path=...)"
        )
    model, tokenizer = load_base(ModelConfig(**base), seed=description["seed"])
    if (folder / "adapter_config.json").exists():
        model = load_adapter(model, str(folder))
    elif description.get("base_is_frozen"):
        model.requires_grad_(False)
    elif (folder / "model.safetensors").exists():
        model, tokenizer = load_base(ModelConfig(**{**base, "name_or_path": str(folder)}))
    else:
        raise CheckpointError(f"{folder} has neither an adapter nor full weights: the save is incomplete")
    template = folder / "chat_template.jinja"  # transformers' name: a recipe's own is not the base's
    if template.exists():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    methods = checkpoint.build_methods(description)
    methods.attach(describe(model))
    methods.to(next(model.parameters()).device)
    checkpoint.load_method_state(folder, methods)
    methods.eval()
    if not attach:
        methods.detach()
    object.__setattr__(model, "headgate_methods", methods)
    model.eval()
    return model, tokenizer


@contextmanager
def attached(model: nn.Module, *methods: Method) -> Iterator[object]:
    """``with attached(model, load_method(LayerRouting, "out")): model.generate(...)``."""
    stack = MethodStack(methods)
    stack.attach(describe(model))
    stack.to(next(model.parameters()).device)
    stack.eval()
    try:
        yield model
    finally:
        stack.detach()


def load_method(kind: type[Method], path: str | Path) -> Method:
    """One saved method with its state, not attached."""
    folder = saved_folder(path)
    description = checkpoint.read_description(folder)
    if kind.name not in description["methods"]:
        raise CheckpointError(f"{folder} holds {sorted(description['methods'])}, no {kind.name}")
    stack = checkpoint.build_methods(description)
    checkpoint.load_method_state(folder, stack)
    return stack[kind.name]
