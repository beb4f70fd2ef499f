"""A LoRA adapter beside the weights it was trained on, without PEFT: y = W x + s B A x, in PEFT's order of operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from headgate.models.private import adapters_disabled


class AdapterEntry(TypedDict):
    """What an exported folder says of one wrapped linear. ``sizes``: inputs and outputs."""

    sizes: list[int]
    rank: int
    scaling: float


class AdaptedLinear(nn.Module):
    """One linear and its adapter. ``lora_A`` ``[r, I]``, ``lora_B`` ``[O, r]``.

    Named as PEFT names them, and switched off the same way, so that what looks for a PEFT layer finds this one.
    """

    _disable_adapters = False

    def __init__(self, base_layer: nn.Module, sizes: tuple[int, int], rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, scaling
        self.lora_A = nn.Linear(sizes[0], rank, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, sizes[1], bias=False, dtype=torch.float32)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if adapters_disabled(self):
            return result
        dtype = result.dtype
        result = result + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * self.scaling
        return result.to(dtype)


def put_adapter(model: nn.Module, modules: Mapping[str, AdapterEntry]) -> None:
    """Wrap the linears at these paths."""
    for path, entry in modules.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        inputs, outputs = entry["sizes"]
        wrapped = AdaptedLinear(getattr(owner, name), (inputs, outputs), entry["rank"], entry["scaling"])
        setattr(owner, name, wrapped)
