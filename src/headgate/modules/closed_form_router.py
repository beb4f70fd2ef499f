"""ClosedFormRouter: skills that come and go with their experts, known by statistics that no gradient step touches.

Training a new skill cannot move the gates of an old one the way a learned router's do when its old inputs are gone. A skill
that goes takes its statistics along: what is left is the router that never met it.

Legend: N experts asked for, P skills.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure


class ClosedFormRouter(FixedPrecision, ABC):
    """``owners``: the expert of every skill. Every buffer's first dimension is that of the skills.

    An expert may own several skills; one without any stands at the centre, z = 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[str] = []
        self._allocate(0, None)

    @abstractmethod
    def zeros(self, skills: int) -> dict[str, Tensor]:
        """Every buffer, by name, of skills of which nothing is known."""

    @abstractmethod
    def learn(self, name: str, look: Tensor, /, *, new: bool = False) -> None:
        """Enter a look at an expert's latest skill, or at a new one; what a look is, each router says."""

    def changed(self) -> None:
        """Skills came or went: compute anew what follows from all of them."""

    def _allocate(self, skills: int, device: torch.device | None) -> None:
        for name, zeros in self.zeros(skills).items():
            self.register_buffer(name, zeros.to(device))

    def remove(self, name: str) -> None:
        """Forget an expert's skills, statistics and all."""
        if name not in self.owners:
            return
        kept = [place for place, owner in enumerate(self.owners) if owner != name]
        for buffer, values in list(self.named_buffers()):
            setattr(self, buffer, values[kept])
        self.owners = [self.owners[place] for place in kept]
        self.changed()

    def give(self, name: str, heir: str) -> None:
        """The skills of one expert are another one's from now on."""
        self.owners = [heir if owner == name else owner for owner in self.owners]

    def place_of(self, name: str, *, new: bool) -> int:
        """Where the latest skill of an expert stands; a ``new`` one gets its place."""
        if new or name not in self.owners:
            self.owners.append(name)
            for buffer, room in self.zeros(1).items():
                values = getattr(self, buffer)
                setattr(self, buffer, torch.cat([values, room.to(values.device)]))
        return len(self.owners) - 1 - self.owners[::-1].index(name)

    def served(self, names: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """The skills of the experts asked for, and the place of each one's owner among ``names``."""
        place = {name: place for place, name in enumerate(names)}
        pairs = [(skill, place[owner]) for skill, owner in enumerate(self.owners) if owner in place]
        skills, experts = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2).unbind(1)
        return skills, experts

    def structure(self) -> Structure:
        return {"owners": list(self.owners)}

    def restore(self, structure: Structure) -> None:
        """Room for the saved skills, before a strict load."""
        self.owners = list(structure["owners"])
        self._allocate(len(self.owners), next(self.buffers()).device)
