"""A run of no steps: the model as its recipe makes it, with its methods as they stand at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headgate.experiments.recipe import Recipe
from headgate.methods.compose import MethodStack
from headgate.methods.registry import build_method
from headgate.models.anatomy import describe

if TYPE_CHECKING:
    from torch import nn


def attached_untrained(recipe: Recipe, model: nn.Module) -> nn.Module:
    """``model`` with the recipe's methods attached, untrained, in evaluation mode."""
    stack = MethodStack(
        [build_method(name, options, recipe.seed) for name, options in recipe.methods.items()]
    )
    stack.attach(describe(model))
    stack.to(next(model.parameters()).device)
    stack.eval()
    object.__setattr__(model, "headgate_methods", stack)
    return model
