"""The LoRA adapter in a live PEFT model, linear by linear: what another program needs to compute what PEFT computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headgate.errors import ModelError
from headgate.models.aside import is_tuner


@dataclass(frozen=True)
class AdaptedPart:
    """Of one wrapped linear: ``layer`` is PEFT's, ``down`` ``[r, I]``, ``up`` ``[O, r]``."""

    layer: nn.Module
    down: Tensor
    up: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.down)


def plain_adapter(base: nn.Module) -> dict[str, AdaptedPart]:
    """By path in the transformers model.

    Raises ModelError for anything but one plain LoRA adapter: a variant (DoRA), trained copies of other modules, biases,
    several adapters at once.
    """
    found: dict[str, AdaptedPart] = {}
    for path, module in base.named_modules():
        if type(module).__name__ in ("ModulesToSaveWrapper", "TrainableTokensWrapper"):
            raise ModelError(
                f"{path} is a trained copy of its module: only plain LoRA is kept beside its base"
            )
        if not is_tuner(module):
            continue
        layer: Any = module
        names = list(layer.active_adapters)
        plain = hasattr(layer, "lora_A") and len(names) == 1 and names[0] in layer.lora_A and not layer.merged
        if (
            not plain
            or names[0] in layer.lora_variant
            or getattr(layer.lora_B[names[0]], "bias", None) is not None
        ):
            raise ModelError(
                f"{path} has more than one plain LoRA adapter on it: only that is kept beside its base"
            )
        (name,) = names
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        found[path] = AdaptedPart(layer, down, up, float(layer.scaling[name]))
    return found
