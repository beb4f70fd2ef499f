"""Roster: which experts there are, since when, how old, how much used, and how well they did.

Facts that never change while an expert trains are JSON (``ExpertInfo``); what moves with every step is a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure

NAN = float("nan")
RATE = 0.05
"""Of the moving usage and loss."""
BUFFERS: dict[str, float] = {
    "age": 0,  # accepted optimizer steps since birth
    "usage": 0.0,  # moving share of the dispatches
    "served": 0.0,  # tokens dispatched to it since birth
    "loss": NAN,  # moving task loss while it was the one that trained
    "loss_at_maturity": NAN,
    "best_eval": NAN,
    "stale_evals": 0,  # evaluations since the best
    "reference_eval": NAN,  # what the next rank doubling is held against
    "reference_step": 0,
}


@dataclass
class ExpertInfo:
    """``founder``: mature from the start. ``born``: optimizer step. ``frozen``: the linears that no longer train.

    ``on_trial``: its segment's evidence is still to decide whether it stays (trial.py). ``resting``: its B is 0, so that a
    skill that the base serves best is sent to the base; it counts towards no cap.
    """

    number: int
    rank: int
    alpha: float
    born: int = 0
    reason: str = "start"
    founder: bool = False
    pinned: bool = False
    on_trial: bool = False
    resting: bool = False
    skills: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.number)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Roster(FixedPrecision):
    """The experts in order of birth, and one entry of every buffer for each.

    Ages stay on the host: every forward's phase follows from them.
    """

    stays_on_cpu = frozenset({"age"})

    age: Tensor
    usage: Tensor
    served: Tensor
    loss: Tensor
    loss_at_maturity: Tensor
    best_eval: Tensor
    stale_evals: Tensor
    reference_eval: Tensor
    reference_step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[ExpertInfo] = []
        self.next_number = 0
        # remembered: among a thousand experts a forward would look for them longer than it computes
        self._named: tuple[str, ...] = ()
        self._places: dict[int, int] = {}
        self._allocate(0)

    def _allocate(self, count: int, device: torch.device | None = None) -> None:
        for name, value in BUFFERS.items():
            where = None if name in self.stays_on_cpu else device
            self.register_buffer(name, torch.full((count,), value, device=where))

    @property
    def device(self) -> torch.device:
        """Where the experts live."""
        return self.usage.device

    def __len__(self) -> int:
        return len(self.infos)

    def __iter__(self) -> Iterator[ExpertInfo]:
        return iter(self.infos)

    def place(self, number: int) -> int:
        """Index of an expert. Raises KeyError for one that does not exist."""
        if len(self._places) != len(self.infos):
            self._places = {info.number: place for place, info in enumerate(self.infos)}
        return self._places[number]

    def info(self, number: int) -> ExpertInfo:
        return self.infos[self.place(number)]

    def named(self, numbers: Sequence[int]) -> tuple[tuple[str, ...], list[float]]:
        """Names and alpha / r of these experts. While they are the same, so is the tuple: a bank knows it by looking once."""
        infos = [self.info(number) for number in numbers]
        names = tuple(info.name for info in infos)
        if names != self._named:
            self._named = names
        return self._named, [info.scale for info in infos]

    @property
    def kept(self) -> list[ExpertInfo]:
        """Those that count towards the caps."""
        return [info for info in self.infos if not (info.on_trial or info.resting)]

    def serving(self, skill: str) -> int | None:
        """The expert that a skill's name was given to."""
        return next((info.number for info in self.infos if skill in info.skills), None)

    def add(self, rank: int, alpha: float, **facts: Any) -> ExpertInfo:
        """A new expert under a number never used before."""
        info = ExpertInfo(self.next_number, rank, alpha, **facts)
        self.next_number += 1
        self.infos.append(info)
        for name, value in BUFFERS.items():
            old: Tensor = getattr(self, name)
            self.register_buffer(name, torch.cat([old, old.new_full((1,), value)]))
        return info

    def remove(self, number: int) -> ExpertInfo:
        place = self.place(number)
        for name in BUFFERS:
            old: Tensor = getattr(self, name)
            self.register_buffer(name, torch.cat([old[:place], old[place + 1 :]]))
        self._places = {}
        return self.infos.pop(place)

    def served_shares(self, numbers: Sequence[int]) -> list[float]:
        """Of all tokens that these experts ever served, each one's share; equal where they served none."""
        served = torch.stack([self.served[self.place(number)] for number in numbers]).double()
        total = served.sum()
        return (served / total if total > 0 else torch.full_like(served, 1 / len(numbers))).tolist()

    def maturity(self, ramp: int, ahead: int = 0) -> list[float]:
        """m_i = age / ramp up to 1, ``ahead`` steps from now; 1 for a founder."""
        ages = self.age.tolist()
        return [
            1.0 if info.founder else min(1.0, (age + ahead) / ramp)
            for info, age in zip(self.infos, ages, strict=True)
        ]

    def follow(
        self, names: Sequence[str], dispatched: Tensor, tokens: Tensor, loss: Tensor, current: int
    ) -> None:
        """An accepted micro-batch: who served which share of its tokens, and the loss of the expert that trains."""
        now, places = (
            torch.zeros_like(self.usage),
            {info.name: place for place, info in enumerate(self.infos)},
        )
        now[[places[name] for name in names]] = dispatched
        self.usage.lerp_(now, RATE)
        self.served += now * tokens
        place = self.place(current)
        old = self.loss[place]
        self.loss[place] = torch.where(old.isnan(), loss, old.lerp(loss, RATE))

    def grow_older(self, ramp: int) -> None:
        """One accepted optimizer step; an expert that matures by it keeps the loss it matured at."""
        self.age += 1
        ripe = (self.age == ramp).to(self.device, non_blocking=True)
        self.loss_at_maturity.copy_(torch.where(ripe, self.loss, self.loss_at_maturity))

    def structure(self) -> Structure:
        return {"experts": [asdict(info) for info in self.infos], "next_number": self.next_number}

    def restore(self, structure: Structure) -> None:
        """The saved experts, with room for their figures."""
        self.infos = [ExpertInfo(**facts) for facts in structure["experts"]]
        self.next_number, self._places = structure["next_number"], {}
        self._allocate(len(self.infos), self.device)
