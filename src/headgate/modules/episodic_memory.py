"""EpisodicMemory: a bounded number of documents of every skill, with what entered the head on them where that is asked for.

Legend: D documents, T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure

PADDING = -100


class EpisodicMemory(FixedPrecision):
    """``documents`` ``[D, T, 2]`` token and label (padded with -100), ``owner`` ``[D]`` the segment each one is of, ``states``
    ``[D, T, H]`` fp16 what entered the head (H = 0: nothing is kept). All on the CPU.
    """

    stays_on_cpu = frozenset({"documents", "owner", "states"})
    documents: Tensor
    owner: Tensor
    states: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.restore({"count": 0, "length": 0, "width": 0})

    def __len__(self) -> int:
        return len(self.owner)

    def add(self, documents_NT2: Tensor, owner: int) -> None:
        """Enter documents, states still unknown."""
        length = max(self.documents.shape[1], documents_NT2.shape[1])
        more = len(documents_NT2)
        grown = (_longer(self.documents, length, PADDING), _longer(documents_NT2, length, PADDING))
        self.documents = torch.cat(grown)
        self.owner = torch.cat([self.owner, torch.full((more,), owner)])
        states = _longer(self.states, length, 0)
        self.states = torch.cat([states, states.new_zeros(more, length, states.shape[2])])

    def know(self, places_N: Tensor, states_NTH: Tensor) -> None:
        """Keep what entered the head on the documents at ``places_N``; T may be shorter than the memory's."""
        if self.states.shape[2] == 0:
            self.states = torch.zeros(*self.documents.shape[:2], states_NTH.shape[2], dtype=torch.float16)
        self.states[places_N, : states_NTH.shape[1]] = states_NTH.to("cpu", torch.float16)

    def before(self, segment: int) -> Tensor:
        """``[n]``: places of the documents of earlier segments."""
        return (self.owner < segment).nonzero().flatten()

    def structure(self) -> Structure:
        return {"count": len(self), "length": self.documents.shape[1], "width": self.states.shape[2]}

    def restore(self, structure: Structure) -> None:
        """Room for what was saved, before a strict load."""
        count, length, width = (structure[name] for name in ("count", "length", "width"))
        self.register_buffer("documents", torch.full((count, length, 2), PADDING))
        self.register_buffer("owner", torch.zeros(count, dtype=torch.long))
        self.register_buffer("states", torch.zeros(count, length, width, dtype=torch.float16))


def _longer(tensor: Tensor, length: int, value: int) -> Tensor:
    """``[D, T, ...]`` padded along T."""
    return functional.pad(tensor, (0, 0, 0, length - tensor.shape[1]), value=value)
