"""What a run really computed: FLOPs of forward and backward, tokens, seconds, peak memory."""

from __future__ import annotations

import resource
import time
from typing import TypeVar, overload

import psutil
import torch
from torch import Tensor

from headgate.models.anatomy import Anatomy
from headgate.models.flops import BlockFlops

Flops = TypeVar("Flops", float, Tensor)
"""A number, or one that a device counts and nobody waits for."""


@overload
def forward_flops(
    anatomy: Anatomy, tokens: float, square_lengths: float, executed_share: float = ..., heads: float = ...
) -> float: ...


@overload
def forward_flops(
    anatomy: Anatomy,
    tokens: Tensor,
    square_lengths: Tensor,
    executed_share: float | Tensor = ...,
    heads: float = ...,
) -> Tensor: ...


def forward_flops(
    anatomy: Anatomy,
    tokens: float | Tensor,
    square_lengths: float | Tensor,
    executed_share: float | Tensor = 1.0,
    heads: float = 1.0,
) -> float | Tensor:
    """A forward over real tokens: ``executed_share`` of the blocks, and the head ``heads`` times.

    ``square_lengths`` is the sum over documents of length * (length + 1) / 2, the attended pairs.
    """
    attended = 4.0 * anatomy.num_heads * anatomy.head_dim * square_lengths
    blocks = anatomy.num_blocks * (tokens * BlockFlops.of(anatomy).block + attended)
    return executed_share * blocks + heads * 2.0 * tokens * anatomy.hidden_size * anatomy.vocab_size


def backward_flops(forward: Flops, tokens: Flops, trainable: int, frozen_base: bool = True) -> Flops:
    """Activations' gradients cost one forward; weights' gradients 2 per trainable weight and token."""
    return forward + 2.0 * tokens * trainable if frozen_base else 2.0 * forward


def peak_memory_bytes() -> int:
    """Peak allocated bytes on the GPU, or peak resident set size of this process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if psutil.MACOS else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * scale


class Stopwatch:
    """Training time: evaluation and checkpoints are left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> float:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None
        return self.seconds

    def read(self) -> float:
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        return self.seconds + running
