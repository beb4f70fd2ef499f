"""Spawn policies: does a skill need an expert of its own?

The plan's meta-router is one of these: a policy sees the evidence about a skill and returns a decision. ``always``
gives every new name an expert, ``never`` keeps to the first, ``oracle`` is ``always`` with the name of unlabelled
segments revealed, and ``novelty`` compares the skill's embedding with the library:

    a label that is known                                     -> known: its expert
    similarity >= threshold (its whole bootstrap interval)    -> known: route to the most similar expert
    similarity < threshold  (its whole bootstrap interval)    -> novel; at the cap: capped
    otherwise, or too few samples, or within the cooldown     -> undecided

What is not known trains an expert of its own on trial (trial.py): a guard must not send a segment into somebody else's
expert. ``gate: own_loss`` is the plan's performance gate, which compares losses on two different texts and so mistakes
an easy text for one that is served.

Deviation: the cooldown holds for spawns that no label announces. A labelled boundary is not noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.lora_experts.spawn_config import POLICY_NAMES
from headgate.methods.lora_experts.spawn_config import SpawnConfig as SpawnConfig
from headgate.modules.skill_library import SkillLibrary
from headgate.ops import novelty
from headgate.ops.randomness import generator

Kind = Literal["novel", "known", "undecided", "capped"]


class Decision(NamedTuple):
    """What to do with a skill. ``expert`` is the one to route to (``known``), or the nearest one, or None.

    ``low`` and ``high`` bound the similarity with 95% confidence; ``n`` is the number of samples seen. Policies
    that do not look at embeddings give NaN for all four numbers.
    """

    kind: Kind
    expert: int | None
    similarity: float
    threshold: float
    low: float
    high: float
    n: int
    reason: str = ""


@dataclass(frozen=True)
class Evidence:
    """What a policy may see.

    Attributes:
        embeddings_NH: masked mean of the final hidden state of every sample, adapters off, fp32.
        tokens_N: tokens in each sample, which weigh it in the skill's mean.
        skill: the skill's name where the segment is labelled; None where the method is not told.
        true_skill: the name whether told or not; only the policy ``oracle`` reads it.
        skills: expert by skill name, for every name met so far.
        num_experts: experts now, on trial or not; current: the one that trained last, by number (numbers outlive evictions).
        last_spawn_step: optimizer step of the last spawn, None before it.
        best_loss: task loss on this skill of the best existing expert; loss_at_maturity: that expert's own loss
            when it matured. None where not measured: ``gate: own_loss`` then does not apply.
    """

    embeddings_NH: Tensor
    tokens_N: Tensor
    skill: str | None = None
    true_skill: str | None = None
    skills: Mapping[str, int] = field(default_factory=dict)
    global_step: int = 0
    last_spawn_step: int | None = None
    num_experts: int = 1
    current: int = 0
    best_loss: float | None = None
    loss_at_maturity: float | None = None


class SpawnPolicy(ABC):
    """Decides over the library that the method keeps; a policy has no state of its own."""

    def __init__(self, config: SpawnConfig, library: SkillLibrary, seed: int = 0) -> None:
        self.config, self.library, self.seed = config, library, seed

    @abstractmethod
    def decide(self, evidence: Evidence) -> Decision:
        """Pure: the same evidence and library give the same decision; nothing is stored."""


POLICIES: dict[str, type[SpawnPolicy]] = {}


def register_policy(name: str) -> Callable[[type[SpawnPolicy]], type[SpawnPolicy]]:
    """Class decorator: offer a policy under ``name``."""

    def register(kind: type[SpawnPolicy]) -> type[SpawnPolicy]:
        POLICIES[name] = kind
        if name not in POLICY_NAMES:
            POLICY_NAMES.append(name)
        return kind

    return register


def build_policy(config: SpawnConfig, library: SkillLibrary, seed: int = 0) -> SpawnPolicy:
    return POLICIES[config.policy](config, library, seed)


def _unmeasured(kind: Kind, expert: int | None, n: int, reason: str) -> Decision:
    nan = float("nan")
    return Decision(kind, expert, nan, nan, nan, nan, n, reason)


def _by_name(name: str, evidence: Evidence, max_experts: int) -> Decision:
    n = len(evidence.embeddings_NH)
    if name in evidence.skills:
        return _unmeasured("known", evidence.skills[name], n, f"skill {name!r} recurs")
    if not evidence.skills and evidence.num_experts == 1:
        return _unmeasured("known", evidence.current, n, "the first skill belongs to the first expert")
    if evidence.num_experts >= max_experts:
        return _unmeasured("capped", evidence.current, n, f"max_experts={max_experts} reached")
    return _unmeasured("novel", None, n, f"skill {name!r} is new")


@register_policy("always")
class Always(SpawnPolicy):
    """An expert for every new name. An unlabelled segment has no name and goes to the latest expert."""

    def decide(self, evidence: Evidence) -> Decision:
        if evidence.skill is None:
            n = len(evidence.embeddings_NH)
            return _unmeasured("known", evidence.current, n, "no label: the latest expert goes on")
        return _by_name(evidence.skill, evidence, self.config.max_experts)


@register_policy("oracle")
class Oracle(SpawnPolicy):
    """An expert for every true skill, labelled or not: the upper bound that ``novelty`` is measured against."""

    def decide(self, evidence: Evidence) -> Decision:
        name = evidence.true_skill or evidence.skill
        if name is None:
            raise ConfigError(
                "spawn policy 'oracle' needs the true skill of every segment: use a data.stream"
            )
        return _by_name(name, evidence, self.config.max_experts)


@register_policy("never")
class Never(SpawnPolicy):
    """One expert for all."""

    def decide(self, evidence: Evidence) -> Decision:
        n = len(evidence.embeddings_NH)
        return _unmeasured("known", evidence.current, n, "policy never spawns")


@register_policy("novelty")
class Novelty(SpawnPolicy):
    """A new expert where the skill's embedding is unlike all that the library holds."""

    def decide(self, evidence: Evidence) -> Decision:
        config, library = self.config, self.library
        n, tokens = len(evidence.embeddings_NH), int(evidence.tokens_N.sum())
        nan = float("nan")
        if evidence.skill is not None and evidence.skill in evidence.skills:
            return _by_name(evidence.skill, evidence, config.max_experts)
        if not library.experts and not evidence.skills:
            return _unmeasured("known", evidence.current, n, "the first skill belongs to the first expert")
        if n < config.min_samples or tokens < config.min_tokens:
            short = f"{n} samples of {config.min_samples}, {tokens} tokens of {config.min_tokens}"
            return Decision("undecided", None, nan, nan, nan, nan, n, f"too little data: {short}")
        if not library.experts:
            return _unmeasured("undecided", None, n, "no skill has been looked at yet")
        thresholds_K = self.thresholds(n)
        cosines_K = library.similarities(evidence.embeddings_NH, evidence.tokens_N).cpu()
        place = int((cosines_K - thresholds_K).argmax())
        nearest, threshold = library.experts[place], float(thresholds_K[place])
        surplus_K = (
            thresholds_K - threshold
        )  # an expert with a higher threshold must be that much more similar
        stream = generator(self.seed, evidence.global_step, "skill_novelty.bootstrap")
        drawn_RK = library.bootstrap_similarities(evidence.embeddings_NH, evidence.tokens_N, stream).cpu()
        similarity = float(novelty.library_similarity(cosines_K - surplus_K, config.similarity))
        low, high = novelty.interval(
            similarity, novelty.library_similarity(drawn_RK - surplus_K, config.similarity), config.confidence
        )

        def decision(kind: Kind, reason: str) -> Decision:
            return Decision(kind, nearest, similarity, threshold, low, high, n, reason)

        if low >= threshold:
            return decision("known", "similar to a known skill")
        if high >= threshold:
            return decision("undecided", "the interval contains the threshold")
        return self._guarded(evidence, decision)

    def thresholds(self, samples: int) -> Tensor:
        """``[K]``: what a look of so many samples is held against, expert by expert."""
        config, count = self.config, len(self.library.experts)
        if config.threshold == "calibrated":
            return self.library.calibrated_thresholds(config.false_spawns, samples)
        fixed = novelty.threshold_schedule(count, config.base, config.delta, config.threshold_min)
        return torch.full((count,), fixed)

    def _guarded(self, evidence: Evidence, decision: Callable[[Kind, str], Decision]) -> Decision:
        config = self.config
        if evidence.num_experts >= config.max_experts:
            return decision("capped", f"novel, but max_experts={config.max_experts} reached")
        last = evidence.last_spawn_step
        if evidence.skill is None and last is not None and evidence.global_step - last < config.cooldown:
            return decision("undecided", f"novel, but within {config.cooldown} steps of the last spawn")
        gated = config.gate == "own_loss" and evidence.best_loss is not None
        if gated and evidence.loss_at_maturity is not None and evidence.best_loss is not None:
            limit = config.loss_ratio * evidence.loss_at_maturity
            if evidence.best_loss <= limit:
                return decision(
                    "known",
                    f"novel, but the best expert serves it: loss {evidence.best_loss:.3f} <= {limit:.3f}",
                )
        return decision("novel", "unlike every known skill")
