"""Rehearsal: rows kept of earlier skills, and a forward over some of them beside the batch's own.

``data.replay`` mixes earlier rows *into* the batches; a method that needs their gradient or their old logits apart (A-GEM,
DER++) keeps them here. The first ``per_skill`` documents that a stage shows, in its random order, are kept: a uniform sample
without replacement, the same on every rank and after a resume, as a reservoir over one pass would hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.costs import Reading
from headgate.methods.documents import as_batch, document_lengths, documents_in
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import Batch
from headgate.modules.episodic_memory import EpisodicMemory


class Rehearsal(nn.Module):
    """The memory of a run and its forwards.

    ``per_skill``: documents kept of each segment. ``memory``: all of its state.
    """

    def __init__(self, name: str, per_skill: int) -> None:
        super().__init__()
        self.name, self.per_skill = name, per_skill
        self.memory = EpisodicMemory()
        self._readings: list[Reading] = []

    def keep(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        """At a stage's start: its documents that have something to learn. Raises ConfigError where none are shown."""
        if probe is None:
            raise ConfigError(
                f"{self.name} keeps rows of every skill, and this trainer shows it none: use HeadgateTrainer"
            )
        left = self.per_skill
        for batch in probe:
            documents = documents_in(batch)
            documents = documents[(documents[:, 1:, 1] != IGNORE_INDEX).any(-1)][:left]
            self.memory.add(documents, scheduled.index)
            left -= len(documents)
            if left <= 0:
                break

    def draw(self, segment: int, count: int, stream: torch.Generator) -> Tensor | None:
        """``[count]`` places of earlier segments' documents, or as many as there are; None in the first."""
        earlier = self.memory.before(segment)
        if not len(earlier):
            return None
        return earlier[torch.randperm(len(earlier), generator=stream)[:count]]

    def batch(
        self, places: Tensor, device: torch.device, *, heads: float, trained: bool
    ) -> dict[str, Tensor]:
        """Documents as a padded batch that will be read: entered in the account.

        ``heads``: passes through the head. ``trained``: a backward follows.
        """
        documents = self.memory.documents[places]
        lengths = document_lengths(documents).float()
        pairs = lengths * (lengths + 1) / 2
        self._readings.append(Reading(float(lengths.sum()), float(pairs.sum()), heads=heads, trained=trained))
        return as_batch(documents, device)

    def take_readings(self) -> Sequence[Reading]:
        """What was read since the last call."""
        readings, self._readings = self._readings, []
        return readings
