"""Lifecycle: what an evaluation or a merge asks for while a skill trains, noted now and done at the next step boundary.

Between the note and the boundary lies the optimizer's step on the old tensors; at the boundary the trainer can rebuild
its optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.step import Step
from headgate.modules.structure import Structure


class Change(Enum):
    WIDEN = "widen"
    FREEZE_FIRST = "freeze_first"
    FREEZE = "freeze"
    REST = "rest"
    """The short replay after a merge is over."""


@dataclass(frozen=True)
class Pending:
    """A change of one expert that waits for a step boundary."""

    change: Change
    expert: int


class Lifecycle:
    """``pending``: what the next boundary does. ``replaying``: merged experts that train beside the stage's own."""

    def __init__(self, config: LoraExpertsConfig, experts: ExpertSet) -> None:
        self.config, self.experts = config, experts
        self.pending: list[Pending] = []
        self.replaying: list[int] = []

    def begin_skill(self, merged: Sequence[Sequence[int]]) -> None:
        """The survivors of these merges train beside the stage's own expert, for ``merge_replay`` steps."""
        there = {info.number for info in self.experts.roster} - {self.experts.current}
        wanted = self.config.merge_replay and self.config.freeze_others
        self.replaying = [n for group in merged for n in group if n in there] if wanted else []
        for number in self.replaying:
            self.experts.thaw(number)

    def end_replay_when_due(self, step: Step) -> None:
        """At the end of an optimizer step: note at the last one of the short replay that it is over."""
        steps = step.global_step + 1 - step.scheduled.start
        if self.replaying and steps == self.config.merge_replay:
            self.pending += [Pending(Change.REST, number) for number in self.replaying]

    def judge(self, loss: float, step: int) -> None:
        """An evaluation of the skill in training: note a doubling or a freezing for the next boundary."""
        number, roster = self.experts.current, self.experts.roster
        place = roster.place(number)
        if not float(roster.best_eval[place]) <= loss:  # nan before the first
            roster.best_eval[place], roster.stale_evals[place] = loss, 0
        else:
            roster.stale_evals[place] += 1
        self._judge_freezing(number, int(roster.stale_evals[place]))
        if self.config.double_after is None:
            return
        reference = float(roster.reference_eval[place])
        first = reference != reference
        if first or step - int(roster.reference_step[place]) >= self.config.double_after:
            little = not first and (reference - loss) / reference < self.config.double_gain
            if little and 2 * roster.info(number).rank <= self.config.max_rank:
                self.pending.append(Pending(Change.WIDEN, number))
            roster.reference_eval[place], roster.reference_step[place] = loss, step

    def _judge_freezing(self, number: int, stale: int) -> None:
        patience, in_part = self.config.freeze_after, bool(self.config.freeze_first)
        if patience is None or not stale:
            return
        if in_part and stale == patience:
            self.pending.append(Pending(Change.FREEZE_FIRST, number))
        elif stale == patience * (1 + in_part):
            self.pending.append(Pending(Change.FREEZE, number))

    def carry_out(self) -> list[str]:
        """Do what is pending; what was done, in words."""
        there = {info.number for info in self.experts.roster}
        reports = [self._do(item) for item in self.pending if item.expert in there]
        self.pending.clear()
        return reports

    def _do(self, item: Pending) -> str:
        experts, number = self.experts, item.expert
        if item.change is Change.WIDEN:
            experts.widen(number)
            return f"expert {number} has rank {experts.roster.info(number).rank}"
        if item.change is Change.REST:
            self.replaying.remove(number)
            experts.freeze(number)
            return f"merged expert {number} is frozen again"
        in_part = item.change is Change.FREEZE_FIRST
        experts.freeze(number, experts.sites_named(self.config.freeze_first) if in_part else None)
        return f"expert {number} frozen{' in part' if in_part else ''}"

    def structure(self) -> Structure:
        pending = [[item.change.value, item.expert] for item in self.pending]
        return {"pending": pending, "replaying": list(self.replaying)}

    def restore(self, structure: Structure) -> None:
        self.pending = [Pending(Change(change), expert) for change, expert in structure["pending"]]
        self.replaying = list(structure["replaying"])
