"""What a method says that it computed, for the account of a run's FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch ran besides, or instead of, one whole forward.

    Attributes:
        share: of the blocks' FLOPs on real tokens that the forward executed.
        forwards: whole forwards without a graph besides its own (a teacher's, a prepass).
        heads: passes through the language-model head alone besides its own.
    """

    share: float | Tensor = 1.0
    forwards: float = 0.0
    heads: float = 0.0


@dataclass(frozen=True)
class Reading:
    """Forwards on rows that are no step's. ``pairs``: sum over documents of length (length + 1) / 2.

    ``heads``: passes through the language-model head. ``share``: of the blocks' FLOPs that ran. ``trained``: a backward to
    the tensors that train followed.
    """

    tokens: float
    pairs: float
    heads: float = 1.0
    share: float = 1.0
    trained: bool = False
