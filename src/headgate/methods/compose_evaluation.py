"""How the methods of a run act while the model is evaluated: routing, validations during training, measured figures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.protocols import (
    ExportsExperts,
    HearsValidation,
    MeasuresEvaluation,
    NotMergeable,
    Routed,
    WatchesValidation,
    having,
)
from headgate.models.anatomy import Batch


class EvaluationVerbs:
    """``MethodStack.evaluation``: asks the methods of a stack, in their order."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._methods = methods

    # -- routing --------------------------------------------------------------------------------------
    @contextmanager
    def routing(self, how: str | None) -> Iterator[None]:
        """Every method acts as ``how`` says, and as before afterwards; None changes nothing.

        Raises ConfigError where there is no method, one has no routing at all, or not this one.
        """
        if how is None:
            yield
            return
        methods = list(self._methods)
        if not methods:
            raise ConfigError(f"routing={how}: this model has no routing method")
        routed = having(methods, Routed)
        before = [(method, method.routing) for method in routed]
        try:
            for method in methods:
                if not having([method], Routed):
                    raise ConfigError(f"{method.name} has no routing to set (asked for {how!r})")
            for one in routed:
                one.set_routing(how)
            yield
        finally:
            for one, was in before:
                one.set_routing(was)

    def switch_on(self) -> None:
        """Routing live, where a method is loaded with it removed."""
        for method in having(self._methods, Routed):
            if method.routing == "removed":
                with contextlib.suppress(ConfigError):  # saved without what it routes to
                    method.set_routing("on")

    # -- validations during training ------------------------------------------------------------------
    @property
    def watches_validation(self) -> bool:
        """Whether a method counts what it sees of a validation: every rank must then see all of it."""
        return bool(having(self._methods, WatchesValidation))

    def start_validation(self, skill: str | None, probe: Callable[[], Iterable[Batch]] | None = None) -> None:
        """``probe()`` gives the validation's batches anew for each method; None where a stream's skill is validated."""
        for method in having(self._methods, WatchesValidation):
            method.on_evaluation_start(skill, None if probe is None else probe())

    def end_validation(self, metrics: Mapping[str, float]) -> None:
        for method in having(self._methods, HearsValidation):
            method.on_evaluation(metrics)

    # -- figures of an evaluation ---------------------------------------------------------------------
    @contextmanager
    def figures(self, padding: int | None) -> Iterator[dict[str, float]]:
        """Yields figures that are there once the context is left; ``padding``: the id that finished rows are filled with."""
        measuring = having(self._methods, MeasuresEvaluation)
        figures: dict[str, float] = {}
        for method in measuring:
            method.start_figures(padding)
        try:
            yield figures
        finally:
            for method in measuring:
                figures.update(method.evaluation_figures())

    # -- leaving the house ----------------------------------------------------------------------------
    def check_mergeable(self) -> None:
        """Raise ConfigError where a method cannot become part of plain weights."""
        for method in having(self._methods, NotMergeable):
            raise ConfigError(method.why_not_merged())

    def exporting_experts(self) -> list[tuple[str, ExportsExperts]]:
        """Name and method of each that keeps experts."""
        return [(m.name, e) for m in self._methods for e in having([m], ExportsExperts)]
