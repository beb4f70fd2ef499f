"""What the methods of a run need of the data: columns, rewritten rows, batches of their own, replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.protocols import (
    FitsColumns,
    FormsBatches,
    MakesColumns,
    NeedsReplay,
    RewritesRows,
    having,
)
from headgate.methods.stage import Stage

RowChange = Callable[[Mapping[str, object], int, float], object]


class DataNeeds:
    """``MethodStack.data``: asks the methods of a stack, in their order."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._methods = methods

    def column_makers(
        self, embed: Callable[[Sequence[str]], Tensor], texts: Sequence[str]
    ) -> dict[str, Callable[[Mapping[str, object]], object]]:
        """Fit the methods' columns to ``texts``, then give what computes each column from a row."""
        makers: dict[str, Callable[[Mapping[str, object]], object]] = {}
        for fitting in having(self._methods, FitsColumns):
            fitting.fit_columns(embed, texts)
        for method in having(self._methods, MakesColumns):
            makers.update(method.column_makers())
        return makers

    def row_changes(self, stage: Stage) -> list[RowChange]:
        """What rewrites the rows that ``stage`` reads, in order."""
        changes = [method.row_transform(stage) for method in having(self._methods, RewritesRows)]
        return [change for change in changes if change is not None]

    def check_replay(self, replayed: bool) -> None:
        """Raise ConfigError where a method waits for rows of earlier skills that never come."""
        for method in self._methods:
            for needing in having([method], NeedsReplay):
                if needing.needs_replay and not replayed:
                    raise ConfigError(
                        f"methods.{method.name}: {needing.needs_replay} works on replayed rows: "
                        "set data.replay: {ratio: 0.1}"
                    )

    def batch_former(self) -> tuple[str, FormsBatches] | None:
        """The name of the method that forms the batches, and the method; None where none does.

        Raises ConfigError, naming both, for two of them.
        """
        forming = [
            (method.name, former)
            for method in self._methods
            for former in having([method], FormsBatches)
            if former.forms_batches
        ]
        if len(forming) > 1:
            names = " and ".join(name for name, _ in forming)
            raise ConfigError(f"{names} each form the batches: use one of them")
        return forming[0] if forming else None
