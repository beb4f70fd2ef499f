"""KeptRows: a few documents of every skill that nothing trains on, so that it can be said what an expert does for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headgate.methods.documents import as_batch, document_ids, labels_without
from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import Batch
from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure

MOST, SHARE = 16, 5
"""Documents kept of a skill, at most; and of so many looked at one, at most."""


class KeptRows(FixedPrecision):
    """``documents`` ``[D, T, 2]`` (documents.py), ``owner`` ``[D]`` the key of each one's skill, ``ids`` ``[D]``."""

    stays_on_cpu = frozenset({"documents", "owner", "ids"})
    documents: Tensor
    owner: Tensor
    ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._allocate(0, 0)

    def _allocate(self, count: int, length: int) -> None:
        self.register_buffer("documents", torch.zeros(count, length, 2, dtype=torch.long))
        self.register_buffer("owner", torch.zeros(count, dtype=torch.long))
        self.register_buffer("ids", torch.zeros(count, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, key: int, documents_NT2: Tensor) -> None:
        """The first documents of a look at a new skill; none where there is only one."""
        if len(documents_NT2) < 2:
            return
        chosen = documents_NT2[: min(MOST, max(1, len(documents_NT2) // SHARE))]
        rows = [row for part in (self.documents, chosen) for row in part.unbind()]
        self.documents = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        self.owner = torch.cat([self.owner, torch.full((len(chosen),), key)])
        self.ids = torch.cat([self.ids, document_ids(chosen)])

    def of(self, key: int, device: torch.device) -> dict[str, Tensor] | None:
        """A skill's documents as a batch; None where none are kept."""
        documents = self.documents[self.owner == key]
        return as_batch(documents, device) if len(documents) else None

    def labels_without(self, batch: Batch) -> Tensor | None:
        """A batch's labels without those of kept documents; None where it has none of them."""
        return labels_without(batch, self.ids) if len(self) else None

    def tokens_in(self, batch: Batch) -> int:
        """Trained tokens of kept documents in a batch."""
        labels = self.labels_without(batch)
        if labels is None:
            return 0
        before, after = (t[..., 1:].ne(IGNORE_INDEX).sum() for t in (batch["labels"], labels))
        return int(before - after)

    def keep_only(self, keys: Iterable[int]) -> None:
        """Skills that are gone take their rows along."""
        kept = torch.isin(self.owner, torch.tensor(list(keys), dtype=torch.long))
        self.documents, self.owner, self.ids = self.documents[kept], self.owner[kept], self.ids[kept]

    def structure(self) -> Structure:
        return {"count": len(self), "length": self.documents.shape[1]}

    def restore(self, structure: Structure) -> None:
        """Room for the saved rows, before a strict load."""
        self._allocate(structure["count"], structure["length"])
