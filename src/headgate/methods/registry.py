"""The methods by the name that recipes and checkpoints use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from headgate.errors import ConfigError
from headgate.methods.base import Method, build_config

LOCATIONS = {
    "layer_routing": "headgate.methods.layer_routing:LayerRouting",
    "schema_bank": "headgate.methods.schema_bank:SchemaBank",
    "lora_experts": "headgate.methods.lora_experts:LoraExperts",
    "backward_gate": "headgate.methods.backward_gate:BackwardGate",
    "ewc": "headgate.methods.ewc:EWC",  # a baseline of continual learning, not one of the four
}


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError with a did-you-mean for an unknown name."""
    if name not in LOCATIONS:
        close = difflib.get_close_matches(name, LOCATIONS, n=1)
        hint = f": did you mean {close[0]!r}?" if close else f": known are {', '.join(LOCATIONS)}"
        raise ConfigError(f"unknown method {name!r}{hint}")
    module, attribute = LOCATIONS[name].split(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def build_method(name: str, options: Mapping[str, Any], seed: int = 0) -> Method:
    """A method from its recipe block."""
    kind = method_class(name)
    method = kind(build_config(kind.Config, options))
    method.seed = seed
    return method
