"""Skills of a stream: whose turn it is, whether it deserves an expert of its own, and what was decided."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.lora_experts.bursts import FIRST_SEEN
from headgate.methods.lora_experts.merging import merge_alike, refresh
from headgate.methods.lora_experts.probe import reference_text, skill_embeddings
from headgate.methods.lora_experts.roster import Roster
from headgate.methods.lora_experts.spawn import Decision, Evidence, build_policy
from headgate.methods.stage import ScheduledStage
from headgate.models.anatomy import Anatomy
from headgate.modules.skill_library import SkillLibrary
from headgate.ops.novelty import token_mean

if TYPE_CHECKING:
    from headgate.methods.lora_experts.config import LoraExpertsConfig

MOST_SAMPLES = 8
"""An undecided skill is looked at again with twice the samples, up to so many times the least number."""
LOSS_BATCHES = 2
PROTOTYPE_BATCHES = 8


class SkillTracking:
    """The part of LoraExperts that follows a stream of skills."""

    config: LoraExpertsConfig
    seed: int
    roster: Roster
    current: int
    library: SkillLibrary
    decisions: list[dict[str, Any]]
    similarities: Tensor | None
    routing: str
    _anatomy: Anatomy | None
    bypassed: Callable[[], Any]
    aside: Callable[..., Any]
    spawn: Callable[..., int]
    router: Callable[..., Any]
    features_of: Callable[..., Tensor]
    train_only: Callable[[int], None]
    least_used: Callable[[], int | None]
    number_of: Callable[[int | str], int]
    learn_usual: Callable[[int, Tensor], None]

    def begin_skill(self, scheduled: ScheduledStage, probe: Any) -> None:
        """Decide about the stage's skill and let its expert train. Raises ConfigError for an undecided one if strict."""
        name = scheduled.stage.options.get("skill")
        if name is None:
            return
        merged = self._merge_alike(scheduled)
        told = name if scheduled.stage.options.get("labelled", True) else None
        embeddings, tokens, decision = self._decide(name, told, scheduled.start, probe)
        number = self._act(decision, told, scheduled.start)
        self.remember(number, embeddings, tokens)
        if self.config.router == "prototype":
            self.introduce(number, probe)
        self.train_only(number)
        refresh(self, merged)  # type: ignore[arg-type]
        self.note(decision, number, scheduled.name, scheduled.start, skill=told, merged=merged)

    def note(self, decision: Decision, expert: int, stage: str, step: int, **more: Any) -> None:
        """Keep a decision with its evidence, for the run's result."""
        self.decisions.append(
            {
                "stage": stage,
                "step": step,
                **{k: _plain(v) for k, v in decision._asdict().items()},
                "expert": expert,
                "similarities": None if self.similarities is None else self.similarities.tolist(),
                **more,
            }
        )

    def _merge_alike(self, scheduled: ScheduledStage) -> list[list[int]]:
        threshold = self.config.merge_above
        return [] if threshold is None else merge_alike(self, threshold)  # type: ignore[arg-type]

    def _act(self, decision: Decision, told: str | None, step: int) -> int:
        if decision.kind == "novel":
            return self.spawn(reason=decision.reason or "novel", skill=told, step=step)
        if decision.kind == "undecided" and self.config.spawn.strict:
            raise ConfigError(
                f"skill {told or 'without a label'} at step {step} is undecided ({decision.reason}): give it more data, "
                "lower spawn.min_samples, or set spawn.strict: false"
            )
        number = self.current if decision.expert is None else self.number_of(decision.expert)
        if told is not None and decision.kind == "known" and self.roster.serving(told) is None:
            self.roster.info(number).skills.append(told)
        return number

    # -- evidence ---------------------------------------------------------------------------------------
    def _decide(
        self, name: str, told: str | None, step: int, probe: Any
    ) -> tuple[Tensor | None, Tensor | None, Decision]:
        config = self.config.spawn
        policy = build_policy(config, self.library, self.seed)
        looks = config.policy not in ("always", "never", "oracle")
        self.similarities = None
        common = {"skill": told, "true_skill": name, **self.standing(step)}
        if not looks:
            none = torch.zeros(0, self.library.width)
            return None, None, policy.decide(Evidence(none, torch.zeros(0, dtype=torch.long), **common))
        assert self._anatomy is not None
        if not bool(self.library.has_reference):
            mix, tokens = reference_text(self._anatomy.model, self.seed, self.bypassed)
            self.library.set_reference(token_mean(mix, tokens), mix)
        samples, known = max(config.min_samples, FIRST_SEEN if self.config.burst else 0), -1
        common |= self.losses_alone(probe)
        most = MOST_SAMPLES * samples
        while True:
            embeddings, tokens = skill_embeddings(
                self._anatomy.model,
                probe,
                min_samples=samples,
                min_tokens=config.min_tokens,
                bypassed=self.bypassed,
            )
            decision = policy.decide(Evidence(embeddings, tokens, **common))
            more = len(tokens) > known and samples < most
            if decision.kind != "undecided" or not more:
                break
            known, samples = len(tokens), 2 * samples
        if self.library.experts:
            self.similarities = self.library.similarities(embeddings, tokens)
            self.library.track(float(self.similarities.max()))
        return embeddings, tokens, decision

    def standing(self, step: int) -> dict[str, Any]:
        """What a policy may know before it looks at any data."""
        room = len(self.roster)
        if self.config.evict and self.least_used() is not None:
            room = min(room, self.config.spawn.max_experts - 1)
        return {
            "skills": {skill: info.number for info in self.roster for skill in info.skills},
            "global_step": step,
            "last_spawn_step": max((i.born for i in self.roster if not i.founder), default=None),
            "num_experts": room,
            "current": self.current,
        }

    def losses_alone(self, probe: Any) -> dict[str, float | None]:
        """Task loss on the skill of the best expert alone, and the loss that expert matured (or ended) at."""
        best: tuple[float, int] | None = None
        batches = list(itertools.islice(iter(probe), LOSS_BATCHES))
        for info in self.roster:
            loss = self._loss_alone(info.number, batches)
            if best is None or loss < best[0]:
                best = loss, info.number
        if best is None:
            return {}
        place = self.roster.place(best[1])
        own = float(self.roster.loss_at_maturity[place])
        own = float(self.roster.loss[place]) if own != own else own
        return {"best_loss": best[0], "loss_at_maturity": None if own != own else own}

    @torch.no_grad()
    def _loss_alone(self, number: int, batches: list[Mapping[str, Any]]) -> float:
        assert self._anatomy is not None
        total = count = 0.0
        with self.aside():
            self.routing = f"expert:{number}"
            for batch in batches:
                inputs = {
                    k: batch[k]
                    for k in ("input_ids", "attention_mask", "position_ids", "labels")
                    if batch.get(k) is not None
                }
                tokens = float(batch["labels"][..., 1:].ne(-100).sum())
                total += float(self._anatomy.model(**inputs, use_cache=False).loss) * tokens
                count += tokens
        return total / max(count, 1.0)

    def introduce(self, number: int, probe: Any) -> None:
        """The closed-form router's first look at a skill; a skill that recurs looks the same and is not entered twice."""
        router = self.router()
        if not float(router.of("count", str(number))):
            router.learn(str(number), self.features_of(itertools.islice(iter(probe), PROTOTYPE_BATCHES)))

    def remember(self, number: int, embeddings: Tensor | None, tokens: Tensor | None) -> None:
        """The library learns what the expert's skill looks like; a sample too few is left for the next look."""
        if embeddings is None or tokens is None or len(tokens) < 2:
            return
        if number in self.library.experts:
            self.library.update(number, embeddings, tokens)
        else:
            self.library.add(number, embeddings, tokens)
        if self.config.burst is not None:
            self.learn_usual(number, embeddings)


def _plain(value: Any) -> Any:
    """NaN is no JSON: None stands for what was not measured."""
    return None if isinstance(value, float) and value != value else value
