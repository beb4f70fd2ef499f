"""SkillStream: whose turn it is, whether a skill deserves an expert of its own, and what was decided and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.lora_experts.bursts import FIRST_SEEN
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.forward import RoutedForward
from headgate.methods.lora_experts.probe import Look, reference_text, skill_embeddings
from headgate.methods.lora_experts.spawn import Decision, Evidence, build_policy
from headgate.methods.stage import ScheduledStage
from headgate.modules.skill_library import SkillLibrary
from headgate.ops.novelty import token_mean

Batches = Iterable[Mapping[str, Any]]
MOST_SAMPLES = 8
"""An undecided skill is looked at again with twice the samples, up to so many times the least number."""
LOSS_BATCHES = 2
PROTOTYPE_BATCHES = 8


class SkillStream(nn.Module):
    """``library``: what skills look like. ``skill``: the one in training. ``decisions``: all of them, for the result.

    ``similarities``: of the last look with every prototype, until telemetry takes them.
    """

    def __init__(self, config: LoraExpertsConfig, routed: RoutedForward, seed: int) -> None:
        super().__init__()
        self.config, self.routed, self.seed = config, routed, seed
        self.library = SkillLibrary(routed.experts.hidden_size, seed=seed, contrast=config.spawn.contrast)
        self.skill: str | None = None
        self.decisions: list[dict[str, Any]] = []
        self.similarities: Tensor | None = None

    # -- a skill begins ---------------------------------------------------------------------------------
    def begin(
        self, scheduled: ScheduledStage, probe: Batches, merged: list[list[int]]
    ) -> tuple[int, Look | None]:
        """Decide about the stage's skill and let its expert train: that expert, and what was looked at.

        Raises ConfigError for an undecided skill if ``spawn.strict``.
        """
        options = scheduled.stage.options
        label = options["skill"] if options.get("labelled", True) else None
        look, decision = self._decide(options["skill"], label, scheduled.start, probe)
        number = self._expert_for(decision, label, scheduled.start)
        if look is not None:
            self.remember(number, look)
        self.introduce(number, probe)
        self.routed.experts.train_only(number)
        self.note(decision, number, scheduled.name, scheduled.start, skill=label, merged=merged)
        return number, look

    def _expert_for(self, decision: Decision, label: str | None, step: int) -> int:
        experts = self.routed.experts
        if decision.kind == "novel":
            skills = [] if label is None else [label]
            return experts.add(reason=decision.reason or "novel", born=step, skills=skills)
        if decision.kind == "undecided" and self.config.spawn.strict:
            raise ConfigError(
                f"skill {label or 'without a label'} at step {step} is undecided ({decision.reason}): give it more data, "
                "lower spawn.min_samples, or set spawn.strict: false"
            )
        number = experts.current if decision.expert is None else experts.number_of(decision.expert)
        if label is not None and decision.kind == "known" and experts.roster.serving(label) is None:
            experts.roster.info(number).skills.append(label)
        return number

    def note(self, decision: Decision, expert: int, stage: str, step: int, **more: Any) -> None:
        """Keep a decision with its evidence, for the run's result."""
        similarities = None if self.similarities is None else self.similarities.tolist()
        facts = {name: _plain(value) for name, value in decision._asdict().items()}
        self.decisions.append(
            {"stage": stage, "step": step, **facts, "expert": expert, "similarities": similarities, **more}
        )

    # -- evidence ---------------------------------------------------------------------------------------
    def _decide(
        self, name: str, label: str | None, step: int, probe: Batches
    ) -> tuple[Look | None, Decision]:
        config = self.config.spawn
        policy = build_policy(config, self.library, self.seed)
        self.similarities = None
        common = {"skill": label, "true_skill": name, **self.standing(step)}
        if config.policy in ("always", "never", "oracle"):
            nothing = torch.zeros(0, self.library.width), torch.zeros(0, dtype=torch.long)
            return None, policy.decide(Evidence(*nothing, **common))
        routed = self.routed
        if not bool(self.library.has_reference):
            mix, tokens = reference_text(routed.anatomy.model, self.seed, routed.bypassed)
            self.library.set_reference(token_mean(mix, tokens), mix)
        samples, seen = max(config.min_samples, FIRST_SEEN if self.config.burst else 0), -1
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
            decision = policy.decide(Evidence(*look, **common))
            more = len(look.tokens) > seen and samples < most
            if decision.kind != "undecided" or not more:
                break
            seen, samples = len(look.tokens), 2 * samples
        if self.library.experts:
            self.similarities = self.library.similarities(*look)
            self.library.track(float(self.similarities.max()))
        return look, decision

    def standing(self, step: int) -> dict[str, Any]:
        """What a policy may know before it looks at any data."""
        experts = self.routed.experts
        count = len(experts.roster)
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
        losses = {info.number: self.routed.loss_alone(info.number, batches) for info in roster}
        best = min(losses, key=losses.__getitem__)
        place = roster.place(best)
        own = float(roster.loss_at_maturity[place])
        own = float(roster.loss[place]) if own != own else own
        return {"best_loss": losses[best], "loss_at_maturity": None if own != own else own}

    # -- what is learned of a skill ---------------------------------------------------------------------
    def introduce(self, number: int, batches: Batches) -> None:
        """The closed-form router's first look at a skill; a skill that recurs looks the same and is not entered twice."""
        router = self.routed.experts.routers.closed_form
        if router is not None and not float(router.of("count", str(number))):
            router.learn(
                str(number), self.routed.features_of(itertools.islice(iter(batches), PROTOTYPE_BATCHES))
            )

    def remember(self, number: int, look: Look) -> None:
        """The library learns what the expert's skill looks like; a sample too few is left for the next look."""
        if len(look.tokens) < 2:
            return
        if number in self.library.experts:
            self.library.update(number, *look)
        else:
            self.library.add(number, *look)

    def forget(self, number: int, heir: int | None) -> None:
        """An expert went."""
        if number in self.library.experts:
            self.library.remove(number)

    # -- saving -----------------------------------------------------------------------------------------
    def structure(self) -> dict[str, Any]:
        return {"library": self.library.structure(), "skill": self.skill, "decisions": self.decisions}

    def restore(self, structure: Mapping[str, Any]) -> None:
        self.library.restore(structure["library"])
        self.skill, self.decisions = structure["skill"], list(structure["decisions"])


def _plain(value: Any) -> Any:
    """NaN is no JSON: None stands for what was not measured."""
    return None if isinstance(value, float) and value != value else value
