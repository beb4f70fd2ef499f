"""Figures that a method measures while it is evaluated, beside the task's own score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class MeasuresEvaluation(Protocol):
    """A method that knows what an evaluation really ran."""

    def start_figures(self, padding: int | None) -> None:
        """Count from here on. ``padding``: the id that a finished row is filled with while others go on."""

    def evaluation_figures(self) -> Mapping[str, float]:
        """What was counted since; counting ends."""


@contextmanager
def evaluation_figures(model: Any, padding: int | None) -> Iterator[dict[str, float]]:
    """Yields figures that are there once the context is left: those of the methods on ``model``, by name."""
    methods = [m for m in getattr(model, "headgate_methods", ()) if isinstance(m, MeasuresEvaluation)]
    figures: dict[str, float] = {}
    for method in methods:
        method.start_figures(padding)
    try:
        yield figures
    finally:
        for method in methods:
            figures.update(method.evaluation_figures())
