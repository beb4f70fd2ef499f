"""What can be named in a recipe, whoever wrote it: built in, registered by a program, or installed beside Headgate.

A package offers its own through an entry point, and nothing of Headgate needs to know it:

    [project.entry-points."headgate.methods"]
    lisa = "headgate_lisa:Lisa"
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Generic, TypeVar

from headgate.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing -> the thing, imported when it is first asked for.

    Args:
        kind: what an error calls one of them: ``method``, ``executor``.
        group: the entry point group that other packages use.
        builtin: name -> ``module:attribute``.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.group, self._builtin = kind, group, dict(builtin)
        self._registered: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Offer ``thing`` in this process. Raises ConfigError for a name that something else has."""
        if name in self._builtin or self._registered.get(name, thing) is not thing:
            raise ConfigError(f"there is a {self.kind} {name!r} already: give yours another name")
        self._registered[name] = thing

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        """Everything that can be asked for, built in first."""
        return list(dict.fromkeys([*self._builtin, *self._registered, *self._installed()]))

    def get(self, name: str) -> T:
        """Raises ConfigError with a did-you-mean and all names for one that nobody offers, or that cannot be imported."""
        if name in self._registered:
            return self._registered[name]
        if name in self._builtin:
            module, attribute = self._builtin[name].split(":")
            thing: T = getattr(importlib.import_module(module), attribute)
            return thing
        entry = self._installed().get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"unknown {self.kind} {name!r}: {hint}installed are {', '.join(self.names())} "
                f"(a package adds its own through the entry point group {self.group})"
            )
        try:
            offered: T = entry.load()
        except Exception as error:  # whatever somebody else's module raises while it is imported
            raise ConfigError(
                f"{self.kind} {name!r} of {entry.value} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        return offered

    def _installed(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {entry.name: entry for entry in importlib.metadata.entry_points(group=self.group)}
