"""SkillStream: whose turn it is, whether a skill deserves an expert of its own, and what was decided and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.documents import documents_in
from headgate.methods.lora_experts.bursts import FIRST_SEEN
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.forward import RoutedForward
from headgate.methods.lora_experts.probe import (
    REFERENCE_ROWS,
    REFERENCE_TOKENS,
    Look,
    reference_text,
    skill_embeddings,
)
from headgate.methods.lora_experts.spawn import Decision, Evidence, build_policy
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import Batch
from headgate.modules.bayes_router import BASE, NOTHING, BayesRouter
from headgate.modules.skill_library import SkillLibrary
from headgate.modules.structure import Structure
from headgate.ops.novelty import token_mean

Batches = Iterable[Batch]
BY_NAME = ("always", "never", "oracle")
"""Policies that never look at data."""
MOST_SAMPLES = 8
"""An undecided skill is looked at again with twice the samples, up to so many times the least number."""
LOSS_BATCHES = 2
PROTOTYPE_BATCHES = 8
TEXT_TOKENS = 1 << 18
"""Of a new skill's training rows, so much is counted for its bigram model: it takes no forward."""
BASE_TEXT = 128, 128
"""Documents that the base writes for its own, and their tokens: with an eighth of them, text that only the base knows went to experts."""


class Segment(NamedTuple):
    """What a stage trains. ``key``: of the skill in the library, None where it is not in it. ``new``: its first time."""

    expert: int
    label: str | None
    key: int | None
    look: Look | None
    new: bool
    on_trial: bool


class SkillStream(nn.Module):
    """``library``: what skills look like. ``skill``: the one in training. ``decisions``: all of them, for the result.

    ``similarities``: of the last look with every prototype, until telemetry takes them. ``likeness``: by expert.
    """

    def __init__(self, config: LoraExpertsConfig, routed: RoutedForward, seed: int) -> None:
        super().__init__()
        self.config, self.routed, self.seed = config, routed, seed
        self.library = SkillLibrary(routed.experts.hidden_size, seed=seed, contrast=config.spawn.contrast)
        self.skill: str | None = None
        self.decisions: list[dict[str, Any]] = []
        self.similarities: Tensor | None = None
        self.likeness: dict[int, float] | None = None

    # -- a skill begins ---------------------------------------------------------------------------------
    def begin(self, scheduled: ScheduledStage, probe: Batches, merged: list[list[int]]) -> Segment:
        """Decide about the stage's skill and let its expert train. Raises ConfigError for an undecided skill if strict."""
        options, experts = scheduled.stage.options, self.routed.experts
        label = options["skill"] if options.get("labelled", True) else None
        unknown = label is not None and experts.roster.serving(label) is None
        look, decision = self._decide(options["skill"], label, scheduled.start, probe)
        number = self._expert_for(decision, label, scheduled.start)
        before = self.library.next_key
        # what may be a known skill, or a mixture, must not hide single documents before its trial has decided
        unsure = decision.kind == "undecided" and decision.high >= decision.threshold
        key = None if look is None or unsure else self.remember(number, look, label)
        new = self.library.next_key > before
        self.introduce(number, probe, new=new or (key is None and unknown))
        experts.train_only(number)
        self.note(decision, number, scheduled.name, scheduled.start, skill=label, merged=merged)
        return Segment(number, label, key, look, new, experts.roster.info(number).on_trial)

    def _expert_for(self, decision: Decision, label: str | None, step: int) -> int:
        """The known one, or a new one; a new one is on trial where its segment's evidence is to decide about it."""
        experts, config, kind = self.routed.experts, self.config.spawn, decision.kind
        if kind == "undecided" and config.strict:
            raise ConfigError(
                f"skill {label or 'without a label'} at step {step} is undecided ({decision.reason}): give it more data, "
                "lower spawn.min_samples, or set spawn.strict: false"
            )
        if kind == "known":
            number = experts.current if decision.expert is None else experts.number_of(decision.expert)
            if label is not None and experts.roster.serving(label) is None:
                experts.roster.info(number).skills.append(label)
            info = experts.roster.info(number)
            if info.resting and experts.lacks_room(info.rank) is None:  # another chance to beat the base
                info.on_trial, info.resting = True, False
            return number
        sure = kind == "novel" and (config.gate == "own_loss" or config.policy in BY_NAME)
        skills = [] if label is None else [label]
        return experts.add(reason=decision.reason or kind, born=step, skills=skills, on_trial=not sure)

    def note(self, decision: Decision, expert: int, stage: str, step: int, **more: object) -> None:
        """Keep a decision with its evidence, for the run's result."""
        similarities = None if self.similarities is None else self.similarities.tolist()
        facts = {name: _plain(value) for name, value in decision._asdict().items()}
        self.decisions.append(
            {"stage": stage, "step": step, **facts, "expert": expert, "similarities": similarities, **more}
        )

    def note_verdict(self, kind: str, expert: int, step: int, reason: str, **facts: object) -> None:
        """Keep what became of an expert on trial, beside the decision that put it there."""
        stage = self.decisions[-1]["stage"]
        plain = {name: _plain(value) for name, value in facts.items()}
        self.decisions.append(
            {"stage": stage, "step": step, "kind": kind, "expert": expert, "reason": reason, **plain}
        )

    # -- evidence ---------------------------------------------------------------------------------------
    def _decide(
        self, name: str, label: str | None, step: int, probe: Batches
    ) -> tuple[Look | None, Decision]:
        config = self.config.spawn
        policy = build_policy(config, self.library, self.seed)
        self.similarities = self.likeness = None
        common = {"skill": label, "true_skill": name, **self.standing(step)}
        if config.policy in BY_NAME:
            nothing = torch.zeros(0, self.library.width), torch.zeros(0, dtype=torch.long)
            return None, policy.decide(Evidence(*nothing, **common))
        routed = self.routed
        if not bool(self.library.has_reference):
            written = self._written()
            mix, tokens = skill_embeddings(routed.anatomy.model, [written], bypassed=routed.bypassed)
            self.library.set_reference(token_mean(mix, tokens), mix)
            routed.readings.note(tokens, heads=0.0)
        samples, seen = max(config.min_samples, FIRST_SEEN if self.config.burst else 0), -1
        if config.gate == "own_loss":
            common |= self.losses_alone(probe)
        most = MOST_SAMPLES * samples
        while True:
            look = skill_embeddings(
                routed.anatomy.model,
                probe,
                min_samples=samples,
                min_tokens=config.min_tokens,
                bypassed=routed.bypassed,
            )
            routed.readings.note(look.tokens, heads=0.0)
            decision = policy.decide(Evidence(*look, **common))
            more = len(look.tokens) > seen and samples < most
            if decision.kind != "undecided" or not more:
                break
            seen, samples = len(look.tokens), 2 * samples
        if self.library.experts:
            self.similarities = self.library.similarities(*look)
            self.likeness = {}
            for expert, similarity in zip(self.library.experts, self.similarities.tolist(), strict=True):
                self.likeness[expert] = max(similarity, self.likeness.get(expert, -1.0))
        return look, decision

    def standing(self, step: int) -> dict[str, Any]:
        """What a policy may know before it looks at any data."""
        experts = self.routed.experts
        count = len(experts.roster.kept)
        if self.config.evict and experts.least_used() is not None:
            count = min(count, self.config.spawn.max_experts - 1)
        return {
            "skills": {skill: info.number for info in experts.roster for skill in info.skills},
            "global_step": step,
            "last_spawn_step": max((i.born for i in experts.roster if not i.founder), default=None),
            "num_experts": count,
            "current": experts.current,
        }

    def losses_alone(self, probe: Batches) -> dict[str, float | None]:
        """Task loss on the skill of the best expert alone, and the loss that expert matured (or ended) at."""
        batches, roster = list(itertools.islice(iter(probe), LOSS_BATCHES)), self.routed.experts.roster
        numbers = self.nearest(8 // LOSS_BATCHES)
        losses = {number: self.routed.loss_alone(number, batches) for number in numbers}
        best = min(losses, key=losses.__getitem__)
        place = roster.place(best)
        own = float(roster.loss_at_maturity[place])
        own = float(roster.loss[place]) if own != own else own
        return {"best_loss": losses[best], "loss_at_maturity": None if own != own else own}

    # -- what is learned of a skill ---------------------------------------------------------------------
    def introduce(self, number: int, batches: Batches, *, new: bool) -> None:
        """The closed-form router's first look at a skill; a skill that recurs looks the same and is not entered twice."""
        router = self.routed.experts.routers.closed_form
        if router is None or not (new or str(number) not in router.owners):
            return
        if isinstance(router, BayesRouter):
            if self.config.base_prior and BASE not in router.owners:
                router.learn(BASE, _text(self._written(BASE_TEXT)["input_ids"]))
            router.learn(str(number), _text_of(batches), new=True)
        else:
            first = itertools.islice(iter(batches), PROTOTYPE_BATCHES)
            router.learn(str(number), self.routed.features_of(first), new=True)

    def _written(self, shape: tuple[int, int] = (REFERENCE_ROWS, REFERENCE_TOKENS)) -> dict[str, Tensor]:
        """What the base writes by itself."""
        written = reference_text(self.routed.anatomy.model, self.seed, self.routed.bypassed, shape)
        self.routed.readings.note(written["attention_mask"].sum(-1), heads=1.0)
        return written

    def remember(self, number: int, look: Look, label: str | None = None, new: bool = False) -> int | None:
        """The library learns what a skill of the expert's looks like, a new name or skill by itself; the skill's key.

        None where there is a sample too few, which is left for the next look.
        """
        if len(look.tokens) < 2:
            return None
        named = None if label is None else self.library.key_of(label)
        if named is not None or (label is None and not new and number in self.library.experts):
            return self.library.update(number, *look, key=named)
        return self.library.add(number, *look, name=label)

    def nearest(self, count: int) -> list[int]:
        """At most so many experts, those first whose skills are most like the last look; any where none was taken."""
        numbers = [info.number for info in self.routed.experts.roster.kept]
        likeness = dict.fromkeys(numbers, -1.0)
        if self.likeness is not None:
            likeness |= {n: v for n, v in self.likeness.items() if n in likeness}
        return sorted(numbers, key=lambda number: -likeness[number])[:count]

    def forget(self, number: int, heir: int | None) -> None:
        """An expert went; its skills are its heir's, or unknown."""
        if number in self.library.experts:
            if heir is None:
                self.library.remove(number)
            else:
                self.library.give(number, heir)

    # -- saving -----------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        likeness = None if self.likeness is None else sorted(self.likeness.items())
        return {
            "library": self.library.structure(),
            "skill": self.skill,
            "decisions": self.decisions,
            "likeness": likeness and [list(item) for item in likeness],
        }

    def restore(self, structure: Structure) -> None:
        self.library.restore(structure["library"])
        self.skill, self.decisions = structure["skill"], list(structure["decisions"])
        likeness = structure["likeness"]
        self.likeness = None if likeness is None else {int(number): value for number, value in likeness}


def _text_of(batches: Batches) -> Tensor:
    """A skill's training rows, each once: the more is counted, the sooner the skill is told apart.

    The first ``TEXT_TOKENS`` of them to the token, so that ranks, which read smaller batches, count what one process does.
    """
    texts, tokens = [], 0
    for batch in batches:
        texts.append(_text(documents_in(batch)[..., 0]))
        tokens += int((texts[-1] != NOTHING).sum())
        if tokens >= TEXT_TOKENS:
            break
    text = torch.cat(texts)
    return text[(text != NOTHING).cumsum(0) <= TEXT_TOKENS]


def _text(ids_DT: Tensor) -> Tensor:
    """Documents one after another, ``NOTHING`` after each."""
    text = F.pad(ids_DT, (0, 1), value=IGNORE_INDEX).flatten()
    return text.masked_fill(text == IGNORE_INDEX, NOTHING)


def _plain(value: object) -> object:
    """NaN is no JSON: None stands for what was not measured."""
    return None if isinstance(value, float) and value != value else value
