"""Several sources in one order of examples, by weight.

Each row of the order is drawn from source i with chance w_i / sum(w), and is the next of that source's own
permutation; a source that is through begins a new one. With ``by_batch`` the chance is drawn once a batch. The order is a pure function of (seed, epoch): a resumed run
walks it again, and nothing has to be saved. An epoch has as many rows as all sources together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from headgate.ops.randomness import generator

GROUP_BATCHES = 50


@dataclass(frozen=True)
class Mixture:
    """Weights of sources that stand end to end in one data set, and how many rows each has."""

    weights: Sequence[float]
    sizes: Sequence[int]
    by_batch: bool = False

    @property
    def shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]

    def order(self, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> MixedOrder:
        """What a trainer draws; with ``lengths``, rows of similar length stand together."""
        return MixedOrder(self, batch_size, seed, lengths)


class MixedOrder(Sampler[int]):
    """Indices into sources that stand end to end."""

    def __init__(
        self, mixture: Mixture, batch_size: int, seed: int, lengths: Sequence[int] | None = None
    ) -> None:
        self.mixture, self.batch_size, self.seed, self.epoch = mixture, batch_size, seed, 0
        self.lengths = lengths

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.mixture.sizes)

    def __iter__(self) -> Iterator[int]:
        drawn = self._drawn()
        if self.lengths is None:
            yield from drawn
            return
        shuffle = generator(self.seed, self.epoch, "data_order.mix.batches")
        while chunk := list(itertools.islice(drawn, self.batch_size * GROUP_BATCHES)):
            chunk.sort(key=lambda i: -self.lengths[i])  # type: ignore[index]
            batches = [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
            ragged = batches.pop() if len(batches[-1]) < self.batch_size else []
            for index in torch.randperm(len(batches), generator=shuffle).tolist():
                yield from batches[index]
            yield from ragged

    def _drawn(self) -> Iterator[int]:
        starts = [0, *itertools.accumulate(self.mixture.sizes)]
        sources = [self._source(i, starts[i], size) for i, size in enumerate(self.mixture.sizes)]
        choice = generator(self.seed, self.epoch, "data_order.mix")
        weights = torch.tensor(self.mixture.shares, dtype=torch.float64)
        left, turns = len(self), self.batch_size if self.mixture.by_batch else 1
        while left:
            count = min(left, max(1, 4096 // turns) * turns)
            left -= count
            drawn = torch.multinomial(weights, -(-count // turns), replacement=True, generator=choice)
            for source in drawn.repeat_interleave(turns)[:count].tolist():
                yield next(sources[source])

    def _source(self, number: int, start: int, size: int) -> Iterator[int]:
        """One source's rows, permutation after permutation."""
        for turn in itertools.count():
            stream = generator(self.seed, turn, f"data_order.mix.{self.epoch}.{number}")
            yield from (start + i for i in torch.randperm(size, generator=stream).tolist())
