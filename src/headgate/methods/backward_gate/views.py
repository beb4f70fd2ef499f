"""Views of the data that form batches: a scored pool of sequences, and a memory that leaves examples out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from headgate.methods.backward_gate.gate import Gate
from headgate.methods.backward_gate.memory import ExampleMemory
from headgate.methods.backward_gate.truth import TRUTH
from headgate.methods.step import real_tokens
from headgate.models.anatomy import Batch, Columns
from headgate.modules.head_sketch import Evidence

SELECTED = "gate_selected"
"""Column that marks a batch whose sequences were scored already. Its sum: tokens scored to fill this batch."""
WEIGHT = "gate_weight"
"""Column of a selected sequence's factor on its loss, where losses are weighted."""
LEFT_OUT, KEPT = "gate_left_out", "gate_kept"
"""Columns that mark a batch of rows that memory spares the forward, and one of the other rows."""
FILL = {"labels": -100, "segment_ids": -1}


def rows_of(batch: Batch, keep: Tensor) -> Columns:
    """The rows of a batch where ``keep [B]`` is true."""
    index = keep.nonzero(as_tuple=True)[0]
    return {
        name: value[index.to(value.device)] if isinstance(value, Tensor) else [value[int(i)] for i in index]
        for name, value in batch.items()
    }


def joined(parts: list[Columns]) -> Columns:
    """Batches of different width as one, padded on the right."""
    out: Columns = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if not isinstance(first, Tensor):
            out[name] = [item for value in values for item in value]
            continue
        if first.dim() > 1:
            width = max(value.shape[1] for value in values)
            fill = FILL.get(name, 0)
            values = [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]
        out[name] = torch.cat(values)
    return out


class FormedBatches(ABC):
    """A stream of batches formed from another; between two of them everything it holds is in ``held``."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.ready: deque[Columns] = deque()
        self.loose: dict[str, list[Columns]] = {}  # mark -> rows that do not fill a batch yet
        self.size = 0  # rows of a batch: those of the first one offered

    def __iter__(self) -> Iterator[dict[str, object]]:
        yield from self._drained()  # what was restored
        for batch in self.batches:
            self.size = self.size or len(batch["labels"])
            self.take(batch)
            yield from self._drained()  # before the next batch is drawn: nothing is in hand that ``held`` misses
        self.end()
        yield from self._drained()

    def _drained(self) -> Iterator[dict[str, object]]:
        while self.ready:
            yield self.ready.popleft()

    @abstractmethod
    def take(self, batch: Batch) -> None:
        """Look at an offered batch; ``pack`` what is to be trained on."""

    @abstractmethod
    def end(self) -> None:
        """The offered batches are over."""

    def pack(self, part: Columns, mark: str) -> None:
        """Add rows to those of the same mark; every batch that becomes full is ready, ``mark`` among its columns."""
        if not len(part["labels"]):
            return
        parts = self.loose.setdefault(mark, [])
        parts.append(part)
        while (held := sum(len(part["labels"]) for part in parts)) >= self.size:
            whole = joined(parts)
            first = torch.arange(held) < self.size
            self.ready.append({**rows_of(whole, first), mark: self.mark()})
            parts[:] = [rows_of(whole, ~first)] if held > self.size else []

    def mark(self) -> Tensor:
        """The column of a batch's mark, ``[size]``."""
        return torch.ones(self.size)

    def held(self) -> tuple[list[Columns], dict[str, int]]:
        """Batches and rows in hand, and counters: what ``restore`` continues from, bit for bit."""
        counts = {f"loose/{mark}": len(parts) for mark, parts in self.loose.items()}
        parts = [*self.ready, *(part for parts in self.loose.values() for part in parts)]
        return parts, {"ready": len(self.ready), "size": self.size, **counts}

    def restore(self, parts: list[Columns], counters: Mapping[str, int]) -> None:
        """Continue from what ``held`` gave. Call before the first batch is drawn."""
        rest = deque(parts)
        self.ready = deque(rest.popleft() for _ in range(counters["ready"]))
        self.loose = {
            key.removeprefix("loose/"): [rest.popleft() for _ in range(count)]
            for key, count in counters.items()
            if key.startswith("loose/")
        }
        self.size = counters["size"]


class PooledSequences(FormedBatches):
    """granularity ``sequence``: score sequences one by one, train on full batches of the selected ones.

    Scoring costs one forward of every sequence without a graph, training one more of what was selected:
    ``1 + (1 + rho) a`` per offered sequence. It pays where a batch mixes novel and redundant sequences.

    Args:
        batches: the trainer's. gate: decides per sequence. evidence_of: batch -> per-sequence Evidence,
            without gradients.
        pool_factor: batches scored before any is trained on, all against the same subspace.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        gate: Gate,
        evidence_of: Callable[[Batch], Evidence],
        pool_factor: int,
    ) -> None:
        super().__init__(batches)
        self.gate, self.evidence_of, self.pool_factor = gate, evidence_of, pool_factor
        self.pool: list[Batch] = []
        self.trained = 0
        self.scored = 0  # tokens of the pool that no batch was charged with yet

    def mark(self) -> Tensor:
        scored, self.scored = self.scored, 0
        return torch.full((self.size,), scored / self.size)

    def take(self, batch: Batch) -> None:
        self.pool.append(batch)
        if len(self.pool) == self.pool_factor:
            self.end()

    def end(self) -> None:
        for batch in self.pool:
            evidence = self.evidence_of(batch)
            self.scored += int(real_tokens(batch).sum())
            rows = [evidence] if evidence.tokens.dim() == 0 else list(_sequences(evidence))
            truths = [float(t) for t in batch[TRUTH]] if TRUTH in batch else [0.0] * len(rows)
            scores = [self.gate.score(row, truth=truth) for row, truth in zip(rows, truths, strict=True)]
            keep = [self.gate.accept(score, optimizer_step=self.trained) for score in scores]
            for score, kept in zip(scores, keep, strict=True):
                if kept:
                    self.gate.update(score)
            before = len(self.ready)
            part = rows_of(batch, torch.tensor(keep))
            if self.gate.config.weighted:  # after ``accept``: what burns in counts 1
                part[WEIGHT] = torch.tensor([s.weight for s, kept in zip(scores, keep, strict=True) if kept])
            self.pack(part, SELECTED)
            self.trained += len(self.ready) - before
        self.pool = []

    def held(self) -> tuple[list[Columns], dict[str, int]]:
        parts, counters = super().held()
        return [*parts, *(dict(b) for b in self.pool)], {
            **counters,
            "trained": self.trained,
            "scored": self.scored,
            "pool": len(self.pool),
        }

    def restore(self, parts: list[Columns], counters: Mapping[str, int]) -> None:
        count = len(parts) - counters["pool"]
        self.pool = list(parts[count:])
        super().restore(parts[:count], counters)
        self.trained, self.scored = counters["trained"], counters["scored"]


def _sequences(evidence: Evidence) -> Iterator[Evidence]:
    for place in range(evidence.tokens.shape[0]):
        yield Evidence(
            evidence.sketch[place],
            evidence.tokens[place],
            evidence.loss[place],
            evidence.entropy[place],
            evidence.error_square[place],
        )


class RememberedRows(FormedBatches):
    """memory: rows that were rejected in a recent epoch are gathered into batches of their own.

    Such a batch is marked ``LEFT_OUT`` and costs neither forward nor backward; the others are full batches of rows
    that may still learn. As many batches come out as went in, so the schedule's clock and the acceptance rate
    remain those of everything offered.
    """

    def __init__(self, batches: Iterable[Batch], memory: ExampleMemory, epoch: Callable[[], int]) -> None:
        super().__init__(batches)
        self.memory, self.epoch = memory, epoch

    def take(self, batch: Batch) -> None:
        rejected = self.memory.rejects(batch["example_id"], self.epoch())
        self.pack(rows_of(batch, rejected), LEFT_OUT)
        self.pack(rows_of(batch, ~rejected), KEPT)

    def end(self) -> None:
        """Rows that fill no batch stay behind."""
