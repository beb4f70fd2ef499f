"""Trial: what a segment trains is on trial until rows that nothing trained on have been asked.

A segment that is novel, undecided, within the cooldown or over the cap trains an expert of its own. Half-way, and at the
boundary before the segment's last step, the losses of the base, of this expert and of the nearest older ones on rows
kept out of training decide (verdict.py): it is kept; or an older expert serves the skill, and the two are merged where
the merge harms no skill of either, or only names and prototypes pass on; or it is dropped; or, where every older expert
is worse than the base, its B is set to 0: the skill is then sent to the base. Over the cap it is never kept, unless
``evict`` makes room. An older expert that trains further is on trial too: where the loss on the rows of any of its
skills rises it gets its factors back, and the rest of the segment trains nothing.

The rows are a fifth of the first documents looked at, 16 at most, taken out of every batch's labels and of the tokens that
its loss is divided by. All of this is state in buffers and JSON: a resumed run takes the same decisions.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from headgate.errors import ConfigError
from headgate.methods.documents import documents_in
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.forward import RoutedForward
from headgate.methods.lora_experts.guard import Guard, no_worse
from headgate.methods.lora_experts.kept_rows import KeptRows
from headgate.methods.lora_experts.merging import absorb, combined
from headgate.methods.lora_experts.probe import Look
from headgate.methods.lora_experts.stream import PROTOTYPE_BATCHES, Batches, Segment, SkillStream
from headgate.methods.lora_experts.verdict import Evidence, Verdict, judge
from headgate.methods.step import IGNORE_INDEX, Step
from headgate.modules.structure import Structure

OTHERS, MERGES = 6, 2
"""Older experts that are asked, which with the base and the expert itself makes eight forwards; and merges tried."""
GOT_WORSE = "has its factors back: a skill of its own got worse"


class Check(Enum):
    HALFWAY = "halfway"
    LAST = "last"


class Outcome(Enum):
    KEPT = "kept"
    MERGED = "merged"
    HANDED_OVER = "handed over"
    """Its skill's name and prototypes are an older expert's, its factors are gone."""
    DROPPED = "dropped"
    RESET = "left to the base"
    """The base serves the skill best: an expert whose B is 0 keeps its tokens from the others."""


class Trial(nn.Module):
    """``rows``: kept of every skill. ``expert``: the one on trial. ``guard``: of an older one that trains further.

    ``key``: of the segment's skill. ``due``: the check of the next boundary, ``step``. ``closed``: the rest of the segment
    trains nothing. ``look_NH``, ``tokens_N``, ``label``: of a skill that enters the library only if the trial says so.
    """

    look_NH: Tensor
    tokens_N: Tensor

    def __init__(self, config: LoraExpertsConfig, routed: RoutedForward) -> None:
        super().__init__()
        self.config, self.routed = config, routed
        self.rows, self.guard = KeptRows(), Guard(routed)
        self.expert: int | None = None
        self.key = 0
        self.due: Check | None = None
        self.step, self.closed = 0, False
        self._nothing_left = False
        self.label: str | None = None
        self._allocate_look(0)

    def _allocate_look(self, count: int) -> None:
        width, device = self.routed.experts.hidden_size, self._device
        self.register_buffer("look_NH", torch.zeros(count, width, device=device))
        self.register_buffer("tokens_N", torch.zeros(count, dtype=torch.long, device=device))

    # -- a segment --------------------------------------------------------------------------------------
    def begin(self, segment: Segment, stream: SkillStream, probe: Batches) -> None:
        """Keep rows of a new skill, and watch the expert that trains, if it is on trial or has served before."""
        self.closed, self.due, self.expert = False, None, None
        self.guard.begin(segment.expert, {})
        self.rows.keep_only(stream.library.keys)
        self.key = -1 - segment.expert if segment.key is None else segment.key
        resting = self.routed.experts.roster.info(segment.expert).resting
        wanted = segment.on_trial or (segment.new and segment.key is not None)
        if wanted and self.rows.of(self.key, self._device) is None:
            batches = itertools.islice(iter(probe), PROTOTYPE_BATCHES)
            documents = [row for batch in batches for row in documents_in(batch).unbind()]
            self.rows.keep(self.key, pad_sequence(documents, True, IGNORE_INDEX))
        self._allocate_look(0)
        if segment.on_trial:
            self.expert, self.label = segment.expert, segment.label
            if segment.look is not None and segment.key is None:
                self.look_NH, self.tokens_N = (part.to(self._device) for part in segment.look)
        elif resting:
            self.closed = True  # there is no room for it to learn
        else:
            self._guard(segment.expert, stream, segment.key if segment.new else None)

    def _guard(self, number: int, stream: SkillStream, new: int | None = None) -> None:
        """An older expert trains further: none of its skills may get worse by it, apart from a ``new`` one."""
        losses = self._own_losses(number, stream)
        self.guard.begin(number, {key: loss for key, loss in losses.items() if key != new})

    def prepare(self, step: Step) -> None:
        """Take the kept rows out of a micro-batch's labels."""
        self._nothing_left = False
        labels = self.rows.labels_without(step.batch)
        if labels is not None:
            step.batch = {**step.batch, "labels": labels}
            step.num_tokens = labels[..., 1:].ne(IGNORE_INDEX).sum()
            self._nothing_left = not bool(step.num_tokens)

    def vote(self, step: Step) -> Tensor | None:
        """No, once the segment is closed; and of a micro-batch that is all kept rows."""
        return torch.tensor(False) if self.closed or self._nothing_left else None

    def end_step(self, step: Step) -> None:
        """Note at an optimizer step's end which check the boundary after it brings."""
        if self.closed or (self.expert is None and self.guard.expert is None):
            return
        start, stop, now = step.scheduled.start, step.scheduled.stop, step.global_step + 1
        last = now == stop - 1 and self.expert is not None  # a guard has its last word when the stage ends
        if last or now == start + (stop - start) // 2 < stop:
            self.due, self.step = Check.LAST if last else Check.HALFWAY, now

    # -- checks -----------------------------------------------------------------------------------------
    def carry_out(self, stream: SkillStream) -> list[str]:
        """At a boundary: the check that is due; what it changed, in words."""
        due, self.due = self.due, None
        if due is not None and self.expert is not None:
            return self._settle(self.expert, stream, due is Check.LAST)
        if due is None or (older := self.guard.expert) is None:
            return []
        self.closed = not self.guard.holds(self._own_losses(older, stream))
        return [f"expert {older} {GOT_WORSE}"] if self.closed else []

    def finish(self, stream: SkillStream, step: int) -> None:
        """After a stage's last step: an older expert that trained in it is looked at once more. It keeps its Parameters."""
        older = self.guard.expert
        if not self.closed and self.expert is None and older is not None:
            self.closed = True
            if not self.guard.holds(self._own_losses(older, stream)):
                stream.note_verdict("factors back", older, step, f"expert {older} {GOT_WORSE}")

    def end(self, stream: SkillStream, step: int) -> None:
        """A segment is over: a trial that no boundary has settled (its segment was too short) is settled now."""
        expert, self.step = self.expert, step
        if expert is not None:
            self._settle(expert, stream, True)
        self.expert = None

    def _settle(self, number: int, stream: SkillStream, last: bool) -> list[str]:
        """Ask the rows; keep, merge, hand over or drop the expert on trial."""
        experts, config = self.routed.experts, self.config.spawn
        evidence = self._evidence(number, stream)
        if evidence is None:
            verdict, reason = Verdict.DROP if last else Verdict.WAIT, "there are no rows to judge it by"
        else:
            verdict = judge(evidence, served=config.served, least_gain=config.least_gain, last=last)
            reason = str(evidence)
        if verdict is Verdict.WAIT:
            return []
        info, heir, outcome = experts.roster.info(number), None, Outcome.DROPPED
        kept = verdict is Verdict.KEEP and self._has_room(info.rank)
        if not kept and verdict is not Verdict.DROP and evidence is not None:
            outcome, heir = self._pass_on(number, evidence, stream)
        if kept:
            outcome, info.on_trial, self.expert = Outcome.KEPT, False, None
            self._enter(number, stream)
        elif outcome is Outcome.DROPPED and evidence is not None and evidence.best_gain < 0:
            outcome, self.expert, self.closed = Outcome.RESET, None, True
            experts.rest(number)
            self._enter(number, stream)
        else:
            self._replace(number, heir, stream, last)
        reason += ", and there is no room" if verdict is Verdict.KEEP and not kept else ""
        facts = {} if evidence is None else evidence.as_json()
        stream.note_verdict(
            outcome.value, number if heir is None else heir, self.step, reason, trial=number, **facts
        )
        return [f"expert {number} {outcome.value}{'' if heir is None else f' to {heir}'}: {reason}"]

    def _pass_on(self, number: int, evidence: Evidence, stream: SkillStream) -> tuple[Outcome, int | None]:
        """Find the skill an older expert: by a merge, or the one that takes most off the base's loss, if any does."""
        merged = self._merge(number, evidence, stream)
        if merged is not None:
            return Outcome.MERGED, merged
        if evidence.best_gain >= self.config.spawn.least_gain * evidence.base:
            return Outcome.HANDED_OVER, evidence.best
        return Outcome.DROPPED, None

    def _replace(self, number: int, heir: int | None, stream: SkillStream, last: bool) -> None:
        """The expert on trial goes, unless a merge took it; who trains for the rest of the segment, if anybody does."""
        experts = self.routed.experts
        others = [info.number for info in experts.roster if info.number != number]
        if len(others) < len(experts.roster):
            experts.remove(number, heir)
        if heir is not None:
            self._enter(heir, stream)
        # somebody's parameters must be live, or there is no optimizer; a closed segment moves none of them
        successor = others[-1] if heir is None else heir
        experts.train_only(successor)
        self.expert, self.closed = None, True
        if heir is not None and not last:
            self._guard(heir, stream)
            self.closed = self.guard.expert is None

    def _enter(self, number: int, stream: SkillStream) -> None:
        """The library learns of a skill that it was not to know before; the rows kept of it are that skill's."""
        if len(self.tokens_N):
            look = Look(self.look_NH.cpu(), self.tokens_N.cpu())
            key = stream.remember(number, look, self.label, new=True)
            if key is not None:
                self.rows.owner[self.rows.owner == self.key], self.key = key, key
            self._allocate_look(0)

    def _has_room(self, rank: int) -> bool:
        with suppress(ConfigError):
            self.routed.experts.make_room(rank)
            return True
        return False

    def _merge(self, number: int, evidence: Evidence, stream: SkillStream) -> int | None:
        """Merge into the first older expert of which no skill gets worse by it and which serves this one better; or None."""
        experts, batch = self.routed.experts, self.rows.of(self.key, self._device)
        assert batch is not None
        for other in sorted(evidence.others, key=evidence.others.__getitem__)[:MERGES]:
            before = self._own_losses(other, stream)
            if not before or experts.roster.info(other).pinned:
                continue
            limit = min(evidence.others[other], evidence.base)
            for weights in ((1.0, 1.0), experts.roster.served_shares([other, number])):
                with experts.trying(other, combined(experts, [other, number], weights)):
                    ours = self.routed.loss_alone(other, [batch])
                    after = self._own_losses(other, stream)
                if ours < limit and no_worse(before, after):
                    absorb(experts, [other, number], weights)
                    return other
        return None

    # -- evidence ---------------------------------------------------------------------------------------
    @property
    def _device(self) -> torch.device:
        return self.routed.experts.roster.device

    def _own_losses(self, number: int, stream: SkillStream) -> dict[int, float]:
        """By key, the loss on the rows of every skill that an expert serves."""
        batches = {key: self.rows.of(key, self._device) for key in stream.library.keys_of(number)}
        return {key: self.routed.loss_alone(number, [b]) for key, b in batches.items() if b is not None}

    def _evidence(self, number: int, stream: SkillStream) -> Evidence | None:
        batch = self.rows.of(self.key, self._device)
        if batch is None:
            return None
        base, loss = (self.routed.loss_alone(who, [batch]) for who in (None, number))
        others = {n: self.routed.loss_alone(n, [batch]) for n in stream.nearest(OTHERS) if n != number}
        best = Evidence(base, loss, others, {}).best
        own = {} if best is None else {best: self._own_share(best, stream)}
        return Evidence(base, loss, others, own)

    def _own_share(self, number: int, stream: SkillStream) -> float | None:
        """Of the base's loss on its own skills, the share that an expert takes off; None without rows of them."""
        keys = [key for key in stream.library.keys_of(number) if self.rows.of(key, self._device) is not None]
        batches = [batch for key in keys if (batch := self.rows.of(key, self._device)) is not None]
        if not batches:
            return None
        return 1 - self.routed.loss_alone(number, batches) / self.routed.loss_alone(None, batches)

    # -- saving -----------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        return {
            "rows": self.rows.structure(),
            "expert": self.expert,
            "key": self.key,
            "due": None if self.due is None else self.due.value,
            "step": self.step,
            "closed": self.closed,
            "guard": self.guard.structure(),
            "look": len(self.tokens_N),
            "label": self.label,
        }

    def restore(self, structure: Structure) -> None:
        self.rows.restore(structure["rows"])
        self.expert, self.key, self.closed = structure["expert"], structure["key"], structure["closed"]
        self.due = None if structure["due"] is None else Check(structure["due"])
        self.step = structure["step"]
        self.guard.restore(structure["guard"])
        self.label = structure["label"]
        self._allocate_look(structure["look"])
