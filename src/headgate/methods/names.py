"""The methods by name, and their settings, without the methods: a recipe is checked before torch is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from headgate.config import StrictConfig
from headgate.errors import ConfigError
from headgate.plugins import Registry

if TYPE_CHECKING:
    from headgate.methods.base import Method

METHODS: Registry[type[Method]] = Registry(
    "method",
    "headgate.methods",
    {
        "layer_routing": "headgate.methods.layer_routing:LayerRouting",
        "schema_bank": "headgate.methods.schema_bank:SchemaBank",
        "lora_experts": "headgate.methods.lora_experts:LoraExperts",
        "backward_gate": "headgate.methods.backward_gate:BackwardGate",
        # baselines of continual learning, none of the four
        "ewc": "headgate.methods.ewc:EWC",
        "agem": "headgate.methods.agem:AGEM",
        "derpp": "headgate.methods.derpp:DERPP",
        "lwf": "headgate.methods.lwf:LwF",
    },
)
SETTINGS = {
    "layer_routing": "headgate.methods.layer_routing.config:LayerRoutingConfig",
    "schema_bank": "headgate.methods.schema_bank.config:SchemaBankConfig",
    "lora_experts": "headgate.methods.lora_experts.config:LoraExpertsConfig",
    "backward_gate": "headgate.methods.backward_gate.config:BackwardGateConfig",
    "ewc": "headgate.methods.continual_config:EWCConfig",
    "agem": "headgate.methods.continual_config:AGEMConfig",
    "derpp": "headgate.methods.continual_config:DERPPConfig",
    "lwf": "headgate.methods.continual_config:LwFConfig",
}
"""``Config`` of Headgate's own, in files that need no torch; another package's comes with its method."""


def config_class(name: str) -> type[StrictConfig]:
    """What the settings of a method are checked against. Raises ConfigError for an unknown name, with a did-you-mean."""
    if name in SETTINGS:
        module, attribute = SETTINGS[name].split(":")
        found: type[StrictConfig] = getattr(importlib.import_module(module), attribute)
        return found
    kind = METHODS.get(name)
    config = getattr(kind, "Config", None)
    if not (isinstance(config, type) and issubclass(config, StrictConfig)):
        raise no_method(name, kind)
    return config


def no_method(name: str, kind: object) -> ConfigError:
    """Somebody offers, under this name, what is no method."""
    return ConfigError(f"method {name!r} is {kind!r}, which is no subclass of headgate.Method")
