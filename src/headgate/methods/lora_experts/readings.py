"""What the experts' decisions read besides the training steps, for the account of a run's computation."""

from __future__ import annotations

from torch import Tensor

from headgate.methods.costs import Reading


class Readings:
    """Kept until the account takes them."""

    def __init__(self) -> None:
        self._kept: list[Reading] = []

    def note(self, lengths: Tensor, heads: float = 1.0) -> None:
        """Rows (or documents) of these lengths were read. ``heads``: the share of their tokens that reached the head."""
        tokens = lengths.double()
        self._kept.append(Reading(float(tokens.sum()), float((tokens * (tokens + 1) / 2).sum()), heads))

    def take(self) -> list[Reading]:
        kept, self._kept = self._kept, []
        return kept
