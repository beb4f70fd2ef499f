"""Novel samples inside a known skill: kept aside, clustered, and trained together once there are enough.

The plan's "token-level novelty" (5.7): a skill may be known as a whole and still bring single documents that no
expert has seen the like of. Each such document waits here; when average-linkage clustering of those waiting finds a
group of ``least`` or more that are alike, that group is a burst. A document does not wait for ever: some of a known
skill's own documents look novel by chance, and in a long enough skill even those would make a burst.

Legend: N documents, T tokens, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headgate.methods.step import IGNORE_INDEX
from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure

FIRST_SEEN = 128
"""Documents of a new skill from which is learned how unlike its others a document of it may be: with so many, what one
document in forty is like is among them 19 times in 20."""


class Burst(NamedTuple):
    """Documents that belong together: ids, mean hidden states ``[N, H]``, text (documents.py), and how many
    documents had been offered when each came."""

    ids: Tensor
    embeddings: Tensor
    documents: Tensor
    arrived: Tensor


class NoveltyBuffer(FixedPrecision):
    """Waiting documents. State: ids, embeddings, text and time of arrival, in buffers of changing size.

    Args:
        width: H. least: documents that make a burst. alike: average cosine within a cluster, centred by the
            reference. capacity: the oldest are dropped beyond it. patience: a document is dropped once so many
            more were offered, novel or not; None: it waits for ever.
    """

    stays_on_cpu = frozenset({"ids", "waiting", "documents", "arrived"})
    ids: Tensor
    waiting: Tensor
    documents: Tensor
    arrived: Tensor

    def __init__(
        self,
        width: int,
        *,
        least: int = 32,
        alike: float = 0.5,
        capacity: int = 1024,
        patience: int | None = None,
    ) -> None:
        super().__init__()
        self.width, self.least, self.alike, self.capacity = width, least, alike, capacity
        self.patience, self.offered = patience, 0
        self._allocate(0, 0)

    def _allocate(self, count: int, length: int) -> None:
        self.register_buffer("ids", torch.zeros(count, dtype=torch.long))
        self.register_buffer("waiting", torch.zeros(count, self.width))
        self.register_buffer("documents", torch.zeros(count, length, 2, dtype=torch.long))
        self.register_buffer("arrived", torch.zeros(count, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.ids)

    def offer(
        self,
        ids: Tensor,
        embeddings_NH: Tensor,
        similarity_N: Tensor,
        threshold: float,
        documents_NT2: Tensor | None = None,
    ) -> int:
        """Keep the documents whose similarity to the library lies under the threshold; how many were kept.

        A document that waits already is not kept twice. Without ``documents_NT2`` their text is not kept.
        """
        self.offered += len(ids)
        self._expire()
        new = (similarity_N < threshold) & ~torch.isin(ids, self.ids)
        if documents_NT2 is None:
            documents_NT2 = torch.zeros(len(ids), 0, 2, dtype=torch.long)
        arrived = torch.full((int(new.sum()),), self.offered)
        self.keep(Burst(ids[new], embeddings_NH[new], documents_NT2[new], arrived))
        return len(arrived)

    def _expire(self) -> None:
        if self.patience is not None:
            self._take(self.arrived > self.offered - self.patience)

    def _take(self, chosen: Tensor) -> None:
        """Only these go on waiting."""
        self.ids, self.waiting = self.ids[chosen], self.waiting[chosen]
        self.documents, self.arrived = self.documents[chosen], self.arrived[chosen]

    def keep(self, more: Burst) -> None:
        """Let documents wait, behind those that do."""
        rows = [row for part in (self.documents, more.documents) for row in part.unbind()]
        stacked = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX) if rows else self.documents
        self.documents = stacked[-self.capacity :]
        self.ids = torch.cat([self.ids, more.ids])[-self.capacity :]
        self.waiting = torch.cat([self.waiting, more.embeddings.float()])[-self.capacity :]
        self.arrived = torch.cat([self.arrived, more.arrived])[-self.capacity :]

    def clear(self) -> None:
        self._allocate(0, 0)

    def burst(self, reference_H: Tensor) -> Burst | None:
        """Take out the largest cluster of at least ``least`` documents, or None while there is none."""
        if len(self) < self.least:
            return None
        unit = torch.nn.functional.normalize(self.waiting - reference_H, dim=-1)
        labels = fcluster(linkage(unit.numpy(), "average", metric="cosine"), 1 - self.alike, "distance")
        sizes = np.bincount(labels)
        if sizes.max() < self.least:
            return None
        chosen = torch.from_numpy(labels == sizes.argmax())
        burst = Burst(self.ids[chosen], self.waiting[chosen], self.documents[chosen], self.arrived[chosen])
        self._take(~chosen)
        return burst

    def structure(self) -> Structure:
        return {"waiting": len(self), "length": self.documents.shape[1], "offered": self.offered}

    def restore(self, structure: Structure) -> None:
        """Room for the saved documents, before a strict load."""
        self.offered = structure["offered"]
        self._allocate(structure["waiting"], structure["length"])


def waiting_for_bursts(width: int, least: int, false_novel: float) -> NoveltyBuffer:
    """A buffer in which chance alone makes no burst.

    A share ``false_novel`` of a known skill's own documents looks novel. Within the patience of
    least / (2 false_novel) documents, least / 2 of those are expected: half of a burst.
    """
    return NoveltyBuffer(width, least=least, patience=round(least / (2 * false_novel)))
