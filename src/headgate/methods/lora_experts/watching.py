"""What a skill brings unannounced: its documents are looked at while it trains, and a burst gets an expert.

Every accepted micro-batch is read once more by the bare model. Documents unlike the whole library wait
(bursts.py); once ``burst`` of them are alike, the spawn policy decides about them as it does about a skill, guards
included. Known: some expert serves them, they go. Undecided: they wait on. Novel: at the next step boundary an
expert is born, the library and a closed-form router learn the burst, and the burst takes the place of the stage's
next batches. Then the stage goes on, with its own expert and the new one both training.

Which batches a burst replaces follows from saved state, so a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.lora_experts.bursts import NoveltyBuffer, as_batch, document_ids, documents_in
from headgate.methods.lora_experts.probe import skill_embeddings
from headgate.methods.lora_experts.roster import Roster
from headgate.methods.lora_experts.spawn import Evidence, Novelty
from headgate.methods.lora_experts.teaching import SKILL
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.modules.skill_library import SkillLibrary
from headgate.ops import novelty

if TYPE_CHECKING:
    from headgate.methods.lora_experts.config import LoraExpertsConfig

OWN = frozenset({"input_ids", "labels", "attention_mask", "position_ids", "segment_ids", "length"})
EXAMPLE = "example_id"
BURST = "burst"
"""The entry of ``pending`` that says that an expert is due."""


class WatchedSkill:
    """The part of LoraExperts that looks for bursts.

    ``novel``: documents that wait. ``burst``: the one that is trained. ``burst_left``: its documents still to come.
    ``usual``: by expert, the cosine with its prototype that nearly all documents of its skill exceed.
    """

    config: LoraExpertsConfig
    seed: int
    skill: str | None
    roster: Roster
    library: SkillLibrary
    current: int
    pending: list[str]
    decisions: list[dict[str, Any]]
    similarities: Tensor | None
    novel: NoveltyBuffer
    burst: NoveltyBuffer
    burst_left: int
    usual: dict[str, float]
    _anatomy: Anatomy | None
    _kept: int
    bypassed: Callable[[], Any]
    spawn: Callable[..., int]
    standing: Callable[[int], dict[str, Any]]
    losses_alone: Callable[[Any], dict[str, float | None]]
    introduce: Callable[[int, Any], None]
    remember: Callable[..., None]
    note: Callable[..., None]

    def watch(self, step: Step) -> None:
        """Keep the novel documents of an accepted micro-batch; at the end of its window, look for a burst."""
        if not self.library.experts:
            return
        assert self._anatomy is not None
        embeddings, _ = skill_embeddings(
            self._anatomy.model, [step.batch], min_samples=1, min_tokens=1, bypassed=self.bypassed
        )
        documents = documents_in(step.batch)
        usual = torch.tensor([self.usual[str(expert)] for expert in self.library.experts])
        excess = (self._cosines(embeddings) - usual).amax(-1)
        self._kept += self.novel.offer(document_ids(documents), embeddings, excess, 0.0, documents)
        if step.is_window_end and self._kept:
            self._kept = 0
            if not self.burst_left and step.global_step + 1 < step.scheduled.stop:
                self._look(step)

    def _cosines(self, embeddings: Tensor) -> Tensor:
        library = self.library
        return novelty.cosines(embeddings, library.prototypes_KH.cpu(), library.reference_H.cpu())

    def learn_usual(self, expert: int, embeddings: Tensor) -> None:
        """How unlike its prototype a document of the expert's skill may be: the least alike of those first seen, with
        half as much room again below it as lies between it and their median.

        Of single documents, since the policy's thresholds are for the mean of many. The minimum, since what is rare in a
        skill (one document in forty, say) often lies apart, where a small quantile falls now on one side, now on the other.
        """
        own = self._cosines(embeddings.cpu())[:, self.library.experts.index(expert)]
        least, median = own.min(), own.median()
        self.usual.setdefault(str(expert), float(least - (median - least) / 2))

    def _look(self, step: Step) -> None:
        found = self.novel.burst(self.library.reference_H.cpu())
        if found is None:
            return
        tokens = (found.documents[..., 0] >= 0).sum(-1)
        rows, device = len(step.batch["input_ids"]), step.batch["input_ids"].device
        batches = [as_batch(part, device) for part in found.documents.split(rows)]
        facts = {**self.standing(step.global_step + 1), **self.losses_alone(batches)}
        evidence = Evidence(found.embeddings, tokens, **facts)
        decision = Novelty(self.config.spawn, self.library, self.seed).decide(evidence)
        if decision.kind == "undecided":
            self.novel.keep(found)
        if decision.kind != "novel":
            return
        self.similarities = self.library.similarities(found.embeddings, tokens)
        self.burst.clear()
        self.burst.keep(found)
        room = (step.scheduled.stop - step.global_step - 1) * step.window_size * rows
        self.burst_left = min(len(self.burst), room)
        self.pending.append(BURST)
        reason = f"a burst of {len(self.burst)} documents: {decision.reason}"
        decision = decision._replace(reason=reason)
        self.note(decision, self.roster.next_number, step.scheduled.name, step.global_step + 1, skill=None)

    def born_of_burst(self) -> str:
        """The expert that was decided on, at a step boundary."""
        decision, documents = self.decisions[-1], self.burst.documents
        number = self.spawn(reason=decision["reason"], step=decision["step"])
        self.remember(number, self.burst.waiting, (documents[..., 0] >= 0).sum(-1))
        if self.config.router == "prototype":
            device = self.roster.age.device
            self.introduce(number, [as_batch(part, device) for part in documents.split(32)])
        self.current = number
        return f"expert {number} born of a burst of {len(self.burst)} documents"

    def next_of_burst(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch, or the burst's next documents in its place. Raises ConfigError for columns they cannot have."""
        other = sorted(set(batch) - OWN - {EXAMPLE, SKILL})
        if other:
            raise ConfigError(
                f"lora_experts.burst: a burst is made of token ids and labels, and another method asks for "
                f"{', '.join(other)}: leave burst out beside it"
            )
        if not self.burst_left:
            return batch
        rows, done = len(batch["input_ids"]), len(self.burst) - self.burst_left
        self.burst_left = max(0, self.burst_left - rows)
        made: dict[str, Any] = as_batch(self.burst.documents[done : done + rows], batch["input_ids"].device)
        names = [f"burst {number}" for number in self.burst.ids[done : done + rows].tolist()]
        columns = {EXAMPLE: names, SKILL: [self.skill] * len(names)}
        return {**made, **{name: column for name, column in columns.items() if name in batch}}

    def burst_structure(self) -> dict[str, Any]:
        return {
            "novel": self.novel.structure(),
            "burst": self.burst.structure(),
            "left": self.burst_left,
            "usual": dict(self.usual),
        }

    def restore_burst(self, structure: Mapping[str, Any]) -> None:
        self.novel.restore(structure["novel"])
        self.burst.restore(structure["burst"])
        self.burst_left, self.usual = structure["left"], dict(structure["usual"])


class BurstBatches:
    """A DataView: the offered batches, some of them replaced by a burst. It holds nothing; the method's state does."""

    def __init__(self, method: WatchedSkill, batches: Iterable[Mapping[str, Any]]) -> None:
        self.method, self.batches = method, batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield self.method.next_of_burst(batch)

    def held(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        return [], {}

    def restore(self, parts: list[dict[str, Any]], counters: Mapping[str, int]) -> None:
        """Nothing is held."""
