"""Looking aside: other forwards of a model that is in training, after which it is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeGuard

import torch
from torch import nn

from headgate.models.private import Tuner, adapters_disabled, can_disable_adapters, disable_adapters


@contextmanager
def look_aside(model: nn.Module, *, adapters: bool = True) -> Iterator[None]:
    """Inside: evaluation mode, no graph and, with ``adapters=False``, PEFT adapters off where there are some.

    Every module gets its own mode back, not the model's: one that was frozen in evaluation mode stays so.
    """
    with evaluating(model), torch.no_grad(), nullcontext() if adapters else adapters_off(model):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, every PEFT layer gives its base layer's output; nothing changes in a model without any.

    PEFT's own switch also turns ``requires_grad`` of the adapter back on, which a stage may have off.
    """
    layers = [module for module in model.modules() if is_tuner(module)]
    before = [adapters_disabled(layer) for layer in layers]
    try:
        for layer in layers:
            disable_adapters(layer, True)
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            disable_adapters(layer, disabled)


def has_adapters(model: nn.Module) -> bool:
    """Whether there is an adapter that can be switched off."""
    return any(is_tuner(module) for module in model.modules())


def is_tuner(module: nn.Module) -> TypeGuard[Tuner]:
    """A PEFT layer: it wraps a base layer and can be switched off."""
    return can_disable_adapters(module) and hasattr(module, "base_layer")
