"""The ideal of routed decoding: the time of the plain model with only the executed rows in every block.

    ideal = T - sum over forwards and blocks of (t(n) - t(open))

T is full depth through ``generate``; t(n) what one block takes for n tokens, of the prompt or of a step (one token a row,
after the prompt), of which the routes of this text open so many. t is measured on the plain model: no router, no gates, a
cache of its own. It is not FLOPs: a block reads all of its weights for one row as for eight (hidden 512, one core: four rows
of a step take .85 of the time of eight), so leaving out half of the rows of every block cannot halve the time. t(0) is keys
and values alone, by their FLOPs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

STEPS = 8


def row_counts(batch: int) -> list[int]:
    """Of a step: what is measured; between two counts t is read off a straight line."""
    return sorted({rows for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, batch) if rows <= batch})


def lengths(prompt: int) -> list[int]:
    """Of a prompt's open part."""
    return sorted({max(prompt // part, 1) for part in (16, 8, 4, 2, 1)} | {3 * prompt // 4})


@contextmanager
def depth(model: PreTrainedModel, blocks: int) -> Iterator[None]:
    """Inside, the first ``blocks`` blocks are the model."""
    before, model.config.num_hidden_layers = model.config.num_hidden_layers, blocks
    try:
        yield
    finally:
        model.config.num_hidden_layers = before


def plain_arms(model: PreTrainedModel, ids: Tensor) -> dict[str, Callable[[], object]]:
    """Steps by rows and prompts ``[B, T]`` by length, through all blocks and through one: what lies between is blocks alone."""
    arms: dict[str, Callable[[], object]] = {}
    for blocks in (model.config.num_hidden_layers, 1):
        for rows in row_counts(len(ids)):
            arms[f"step {rows}, {blocks}"] = _steps(model, ids[:rows], blocks)
        for length in lengths(ids.shape[1]):
            arms[f"prompt {length}, {blocks}"] = _prompt(model, ids[:, :length], blocks)
    return arms


def _prompt(model: PreTrainedModel, ids: Tensor, blocks: int) -> Callable[[], CausalLMOutputWithPast]:
    def work() -> CausalLMOutputWithPast:
        with torch.no_grad(), depth(model, blocks):
            output: CausalLMOutputWithPast = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return output

    return work


def _steps(model: PreTrainedModel, ids: Tensor, blocks: int) -> Callable[[], object]:
    cache = _prompt(model, ids, blocks)().past_key_values
    assert cache is not None

    def work() -> None:
        with torch.no_grad(), depth(model, blocks):
            for _ in range(STEPS):
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-STEPS)

    return work


@dataclass
class BlockTimes:
    """Seconds of one block in one forward, by number of tokens; from 0: keys and values alone."""

    tokens: Sequence[int]
    seconds: Sequence[float]

    @classmethod
    def of(
        cls, kind: str, measured: Mapping[str, list[float]], sizes: Mapping[int, int], blocks: int, kv: float
    ) -> BlockTimes:
        """From what ``plain_arms`` took. ``sizes``: tokens by the arm's number; ``kv``: keys' and values' share of a block."""
        each, calls = [], STEPS if kind == "step" else 1
        for number in sizes:
            deep, flat = measured[f"{kind} {number}, {blocks}"], measured[f"{kind} {number}, 1"]
            each.append(
                statistics.median((a - b) / (blocks - 1) / calls for a, b in zip(deep, flat, strict=True))
            )
        return cls([0, *sizes.values()], [kv * each[-1], *each])

    def __call__(self, tokens: int) -> float:
        """t(tokens)."""
        above = next(place for place, known in enumerate(self.tokens) if known >= tokens)
        if self.tokens[above] == tokens:
            return self.seconds[above]
        low, high = self.tokens[above - 1], self.tokens[above]
        share = (tokens - low) / (high - low)
        return (1 - share) * self.seconds[above - 1] + share * self.seconds[above]

    def saved(self, opened: Sequence[Sequence[int]]) -> float:
        """Seconds that leaving tokens out is worth: ``opened`` ones of every block, forward by forward."""
        return sum(self.seconds[-1] - self(tokens) for forward in opened for tokens in forward)


def saved(
    measured: Mapping[str, list[float]],
    opened: Sequence[Sequence[int]],
    shape: tuple[int, int],
    blocks: int,
    kv: float,
) -> tuple[float, BlockTimes]:
    """Seconds of a whole generation: ``opened`` tokens ``[1 + steps, blocks]``, the prompt first; and t of its steps."""
    batch, prompt = shape
    first = BlockTimes.of("prompt", measured, {n: n * batch for n in lengths(prompt)}, blocks, kv)
    later = BlockTimes.of("step", measured, {rows: rows for rows in row_counts(batch)}, blocks, kv)
    return first.saved(opened[:1]) + later.saved(opened[1:]), later
