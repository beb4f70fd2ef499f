"""The methods by the name that recipes and checkpoints use: Headgate's own and anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from headgate.errors import ConfigError
from headgate.methods.base import Method, build_config
from headgate.methods.compose import MethodStack
from headgate.plugins import Registry

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
Kind = TypeVar("Kind", bound=type[Method])


def register_method(kind: Kind) -> Kind:
    """Class decorator: recipes and saved runs may name ``kind.name``, in this process.

    For every process, the command line included, let the package declare an entry point in ``headgate.methods``.
    Raises ConfigError for a class without ``name`` or ``Config``, and for a name that is taken.
    """
    for attribute in ("name", "Config"):
        if not hasattr(kind, attribute):
            raise ConfigError(
                f"{kind.__name__} has no {attribute}: a method sets the class attributes name and Config"
            )
    METHODS.register(kind.name, kind)
    return kind


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError with a did-you-mean for an unknown name."""
    kind = METHODS.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise ConfigError(f"method {name!r} is {kind!r}, which is no subclass of headgate.Method")
    return kind


def build_method(name: str, options: Mapping[str, Any], seed: int = 0) -> Method:
    """A method from its recipe block."""
    kind = method_class(name)
    method = kind(build_config(kind.Config, options))
    method.seed = seed
    return method


def build_stack(blocks: Mapping[str, Mapping[str, Any]], seed: int = 0) -> MethodStack:
    """All methods of a recipe, from its ``methods``."""
    return MethodStack(build_method(name, options, seed) for name, options in blocks.items())
