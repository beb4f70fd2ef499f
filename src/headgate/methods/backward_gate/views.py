"""Views of the data that form batches: a scored pool of sequences, and a memory that leaves examples out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headgate.methods.backward_gate.gate import Gate
from headgate.methods.backward_gate.memory import ExampleMemory
from headgate.modules.head_sketch import Evidence

SELECTED = "gate_selected"
"""Column that marks a batch whose sequences were scored already."""
FILL = {"labels": -100, "segment_ids": -1}

Batch = Mapping[str, Any]


def rows_of(batch: Batch, keep: Tensor) -> dict[str, Any]:
    """The rows of a batch where ``keep [B]`` is true."""
    index = keep.nonzero(as_tuple=True)[0]
    return {
        name: value[index.to(value.device)] if isinstance(value, Tensor) else [value[int(i)] for i in index]
        for name, value in batch.items()
    }


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of different width as one, padded on the right."""
    out: dict[str, Any] = {}
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


class Packer:
    """Collects rows and gives them back in batches of a constant number of rows."""

    def __init__(self, rows: int) -> None:
        self.rows, self.parts, self.held = rows, list[dict[str, Any]](), 0

    def add(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Take rows in; yield every batch that became full."""
        count = len(part["labels"])
        if not count:
            return
        self.parts.append(part)
        self.held += count
        while self.held >= self.rows:
            whole = joined(self.parts)
            first = torch.arange(self.held) < self.rows
            yield rows_of(whole, first)
            self.held -= self.rows
            self.parts = [rows_of(whole, ~first)] if self.held else []


class PooledSequences:
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
        self.batches, self.gate, self.evidence_of, self.pool_factor = batches, gate, evidence_of, pool_factor
        self.trained = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pool: list[Batch] = []
        packer: Packer | None = None
        for batch in self.batches:
            packer = packer or Packer(len(batch["labels"]))
            pool.append(batch)
            if len(pool) == self.pool_factor:
                yield from self._train_on(pool, packer)
                pool = []
        if pool and packer is not None:
            yield from self._train_on(pool, packer)

    def _train_on(self, pool: list[Batch], packer: Packer) -> Iterator[dict[str, Any]]:
        chosen = []
        for batch in pool:
            evidence = self.evidence_of(batch)
            rows = [evidence] if evidence.tokens.dim() == 0 else list(_sequences(evidence))
            scores = [self.gate.score(row) for row in rows]
            keep = [self.gate.accept(score, optimizer_step=self.trained) for score in scores]
            for score, kept in zip(scores, keep, strict=True):
                if kept:
                    self.gate.update(score)
            chosen.append(rows_of(batch, torch.tensor(keep)))
        for part in chosen:
            for full in packer.add(part):
                self.trained += 1
                yield {**full, SELECTED: torch.ones(len(full["labels"]), dtype=torch.bool)}


def _sequences(evidence: Evidence) -> Iterator[Evidence]:
    for place in range(evidence.tokens.shape[0]):
        yield Evidence(
            evidence.sketch[place],
            evidence.tokens[place],
            evidence.loss[place],
            evidence.entropy[place],
            evidence.error_square[place],
        )


class RememberedRows:
    """memory: leave out examples that were rejected in a recent epoch, refill batches with the others.

    A left-out example costs neither forward nor backward; the gate counts full batches of them as offered
    and rejected, so that the acceptance rate stays that of everything offered.
    """

    def __init__(
        self, batches: Iterable[Batch], gate: Gate, memory: ExampleMemory, epoch: Callable[[], int]
    ) -> None:
        self.batches, self.gate, self.memory, self.epoch = batches, gate, memory, epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        packer: Packer | None = None
        left_out, size = 0, 0
        for batch in self.batches:
            size = size or len(batch["labels"])
            packer = packer or Packer(size)
            rejected = self.memory.rejects(batch["example_id"], self.epoch())
            left_out += int(rejected.sum())
            while left_out >= size:
                self.gate.skip()
                left_out -= size
            yield from packer.add(rows_of(batch, ~rejected))
