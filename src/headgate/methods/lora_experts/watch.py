"""BurstWatch: what a skill brings unannounced. Its documents are looked at while it trains, and a burst gets an expert.

Every accepted micro-batch is read once more by the bare model. Documents unlike the whole library wait
(bursts.py); once ``burst`` of them are alike, the spawn policy decides about them as it does about a skill, guards
included. Known: some expert serves them, they go. Undecided: they wait on. Novel: at the next step boundary an
expert is born, the library and a closed-form router learn the burst, and the burst takes the place of the stage's
next batches. Then the stage goes on, with its own expert and the new one both training.

Which batches a burst replaces follows from saved state, so a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.documents import as_batch, document_ids, document_lengths, documents_in
from headgate.methods.lora_experts.bursts import NoveltyBuffer, waiting_for_bursts
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.forward import RoutedForward
from headgate.methods.lora_experts.probe import Look, skill_embeddings
from headgate.methods.lora_experts.spawn import Evidence, Novelty
from headgate.methods.lora_experts.stream import SkillStream
from headgate.methods.lora_experts.teaching import SKILL
from headgate.methods.step import Step
from headgate.models.anatomy import Batch, Columns
from headgate.modules.skill_library import SkillLibrary
from headgate.modules.structure import Structure
from headgate.ops import novelty

OWN = frozenset({"input_ids", "labels", "attention_mask", "position_ids", "segment_ids", "length"})
EXAMPLE = "example_id"
INTRODUCTION_ROWS = 32


class BurstWatch(nn.Module):
    """``novel``: documents that wait. ``burst``: the one that is trained. ``left``: its documents still to come.

    ``due``: whether the next boundary brings the burst's expert.
    """

    def __init__(self, config: LoraExpertsConfig, routed: RoutedForward, seed: int) -> None:
        super().__init__()
        assert config.burst is not None
        self.config, self.routed, self.seed = config, routed, seed
        width = routed.experts.hidden_size
        self.novel = waiting_for_bursts(width, config.burst, config.spawn.false_spawns)
        self.burst = NoveltyBuffer(width, least=config.burst)
        self.left, self.due = 0, False
        self._fresh = 0  # documents kept since the last look for a burst; a window begins and ends at 0

    def read(self, step: Step, stream: SkillStream) -> None:
        """Keep the novel documents of an accepted micro-batch; at the end of its window, look for a burst."""
        library = stream.library
        if not library.experts:
            return
        model, bypassed = self.routed.anatomy.model, self.routed.bypassed
        look = skill_embeddings(model, [step.batch], min_samples=1, min_tokens=1, bypassed=bypassed)
        documents = documents_in(step.batch)
        excess = (_cosines(library, look.embeddings) - library.usual_K.cpu()).amax(-1)
        self._fresh += self.novel.offer(document_ids(documents), look.embeddings, excess, 0.0, documents)
        if step.is_window_end and self._fresh:
            self._fresh = 0
            if not self.left and step.global_step + 1 < step.scheduled.stop:
                self._look_for_burst(step, stream)

    def _look_for_burst(self, step: Step, stream: SkillStream) -> None:
        burst = self.novel.burst(stream.library.reference_H.cpu())
        if burst is None:
            return
        look = Look(burst.embeddings, document_lengths(burst.documents))
        rows, device = len(step.batch["input_ids"]), step.batch["input_ids"].device
        batches = [as_batch(part, device) for part in burst.documents.split(rows)]
        facts = stream.standing(step.global_step + 1) | stream.losses_alone(batches)
        decision = Novelty(self.config.spawn, stream.library, self.seed).decide(Evidence(*look, **facts))
        if decision.kind == "undecided":
            self.novel.keep(burst)
        if decision.kind != "novel":
            return
        stream.similarities = stream.library.similarities(*look)
        self.burst.clear()
        self.burst.keep(burst)
        room = (step.scheduled.stop - step.global_step - 1) * step.window_size * rows
        self.left, self.due = min(len(self.burst), room), True
        decision = decision._replace(reason=f"a burst of {len(self.burst)} documents: {decision.reason}")
        number = self.routed.experts.roster.next_number
        stream.note(decision, number, step.scheduled.name, step.global_step + 1, skill=None)

    def birth(self, stream: SkillStream) -> list[str]:
        """The expert that was decided on, at a step boundary; what happened, in words."""
        if not self.due:
            return []
        self.due = False
        decision, documents, experts = stream.decisions[-1], self.burst.documents, self.routed.experts
        number = experts.add(reason=decision["reason"], born=decision["step"])
        look = Look(self.burst.waiting, document_lengths(documents))
        stream.remember(number, look)
        device = experts.roster.device
        stream.introduce(
            number, [as_batch(part, device) for part in documents.split(INTRODUCTION_ROWS)], new=True
        )
        experts.current = number
        return [f"expert {number} born of a burst of {len(self.burst)} documents"]

    def next_batch(self, batch: Batch, skill: str | None) -> Batch:
        """The batch, or the burst's next documents in its place. Raises ConfigError for columns they cannot have."""
        other = sorted(set(batch) - OWN - {EXAMPLE, SKILL})
        if other:
            raise ConfigError(
                f"lora_experts.burst: a burst is made of token ids and labels, and another method asks for "
                f"{', '.join(other)}: leave burst out beside it"
            )
        if not self.left:
            return batch
        rows, start = len(batch["input_ids"]), len(self.burst) - self.left
        self.left = max(0, self.left - rows)
        ours: Columns = as_batch(self.burst.documents[start : start + rows], batch["input_ids"].device)
        names = [f"burst {number}" for number in self.burst.ids[start : start + rows].tolist()]
        columns = {EXAMPLE: names, SKILL: [skill] * len(names)}
        return {**ours, **{name: column for name, column in columns.items() if name in batch}}

    def structure(self) -> Structure:
        return {
            "novel": self.novel.structure(),
            "burst": self.burst.structure(),
            "left": self.left,
            "due": self.due,
        }

    def restore(self, structure: Structure) -> None:
        self.novel.restore(structure["novel"])
        self.burst.restore(structure["burst"])
        self.left, self.due = structure["left"], structure["due"]


class BurstBatches:
    """A DataView: the offered batches, some of them replaced by a burst. It holds nothing; the watch's state does."""

    def __init__(self, watch: BurstWatch, stream: SkillStream, batches: Iterable[Batch]) -> None:
        self.watch, self.stream, self.batches = watch, stream, batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield self.watch.next_batch(batch, self.stream.skill)

    def held(self) -> tuple[list[Columns], dict[str, int]]:
        return [], {}

    def restore(self, parts: list[Columns], counters: Mapping[str, int]) -> None:
        """Nothing is held."""


def _cosines(library: SkillLibrary, embeddings: Tensor) -> Tensor:
    return novelty.cosines(embeddings, library.prototypes_KH.cpu(), library.reference_H.cpu())
