"""Small random models whose blocks do something, and a method whose gates a test decides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headgate.methods.context import Context
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.layer_routing.route import Route
from headgate.models.anatomy import Anatomy, describe
from headgate.models.load import load_model

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]


class Forced(LayerRouting):
    """Gates given by the test, ``[B|1, T|1, G]``; a cached step takes those of its own positions."""

    gates: Tensor

    def decide(self, hidden: Tensor, context: Context, training: bool) -> Route:
        gates, past = self.gates, context.past
        if gates.shape[1] > 1:
            gates = gates[:, past : past + hidden.shape[1]]
        return Route(gates, context)


def model_of(
    family: str = "llama", lora: bool = True, attention: str = "auto", sliding_window: int | None = None
) -> tuple[Any, Any, Anatomy]:
    """A model with weights large enough that every block matters, and an adapter that is not zero."""
    adapter = {"dropout": 0.0} if lora else None
    model, tokenizer = load_model(
        f"random:{family}", lora=adapter, seed=1, device="cpu", attn_implementation=attention
    )
    if sliding_window is not None:
        describe(model).model.config.sliding_window = sliding_window
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.08)
    return model.eval(), tokenizer, describe(model)


def batch_of(rows: int = 3, length: int = 9, padded: bool = True, left: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))
    batch = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        for row in range(rows):
            cut = min(row * 2, length - 1)
            if cut:
                mask[row, :cut] = 0
        batch["attention_mask"] = mask if left else mask.flip(1)
    return batch


def attach(method: LayerRouting, anatomy: Anatomy) -> LayerRouting:
    method.attach(anatomy)
    return method.eval()
