"""The methods by the name that recipes and checkpoints use: Headgate's own and anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from headgate.config import build_config
from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.compose import MethodStack
from headgate.methods.names import METHODS, no_method

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
        raise no_method(name, kind)
    return kind


def build_method(name: str, options: Mapping[str, object], seed: int = 0) -> Method:
    """A method from its recipe block."""
    kind = method_class(name)
    method = kind(build_config(kind.Config, options))
    method.seed = seed
    return method


def build_stack(blocks: Mapping[str, Mapping[str, object]], seed: int = 0) -> MethodStack:
    """All methods of a recipe, from its ``methods``."""
    return MethodStack(build_method(name, options, seed) for name, options in blocks.items())
