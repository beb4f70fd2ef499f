"""What is open, as the host must know it to leave blocks and tokens out: one copy a forward, for all blocks.

A block that asks the device whether a gate is open waits for it. The gates of all blocks are known before the first of
them runs, so they are copied once, and every index is made from that copy. A route that a document keeps is copied once
for all of its tokens.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from headgate.models.block_parts import OpenTokens

NAMES = {(True, True, True): "open", (False, True, True): "full", (False, False, False): "closed"}


class HostGates:
    """The host's copy of gates ``[B|1, T|1, G]``, and the gates of every block, made when first asked for.

    ``step`` ``[B|1][G]``: the copy of one token a row, in Python: a decoding step counts every operation. None of more.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.step: list[list[float]] | None = None
        if weight.shape[1] == 1:
            self._host = weight.detach().cpu()
            self.step = self._host.squeeze(1).tolist()
        self._kinds = [NAMES.get(row, "mixed") for row in self._asked()]
        self._blocks: dict[int, BlockGates] = {}

    @cached_property
    def _opened_and_ones(self) -> Tensor:
        if self.step is not None:
            return torch.stack([self._host != 0, self._host == 1])
        weight = self.weight.detach()
        return torch.stack([weight != 0, weight == 1]).cpu()

    @property
    def opened(self) -> Tensor:
        """Not 0; on the host."""
        return self._opened_and_ones[0]

    @property
    def ones(self) -> Tensor:
        """Exactly 1; on the host."""
        return self._opened_and_ones[1]

    def _asked(self) -> list[tuple[bool, bool, bool]]:
        """Of every gate: are all of them 1, some not 0, all not 0?"""
        if self.step is not None:
            gates = map(set, zip(*self.step, strict=True))
            return [(found == {1.0}, found != {0.0}, 0.0 not in found) for found in gates]
        every, some = self.opened.flatten(0, 1).all(0), self.opened.flatten(0, 1).any(0)
        asked = torch.stack([self.ones.flatten(0, 1).all(0), some, every], 1).tolist()
        return [(row[0], row[1], row[2]) for row in asked]

    def kind(self, first: int, last: int) -> str:
        """Of gates ``[first, last)`` together; see ``BlockGates``."""
        kind = self._kinds[first]
        return kind if all(other == kind for other in self._kinds[first + 1 : last]) else "mixed"

    def of_block(self, first: int, last: int) -> BlockGates:
        """Gates ``[first, last)``; the same object every time."""
        found = self._blocks.get(first)
        if found is None:
            found = self._blocks[first] = BlockGates(self, first, last)
        return found


class BlockGates:
    """The gates of one block's units: ``kind`` is ``open`` (all 1), ``full`` (none 0), ``closed`` (all 0) or ``mixed``.

    ``learns``: whether the gates have a gradient to give.
    """

    def __init__(self, gates: HostGates, first: int, last: int) -> None:
        self.gates, self.inside = gates, slice(first, last)
        self.kind = gates.kind(first, last)
        self.learns = gates.weight.requires_grad
        self._tokens: dict[tuple[int, int, int], OpenTokens] = {}

    @property
    def weight(self) -> Tensor:
        """``[B|1, T|1, U]``, where the block is."""
        return self.gates.weight[..., self.inside]

    @property
    def ones(self) -> Tensor:
        """Exactly 1; on the host."""
        return self.gates.ones[..., self.inside]

    @property
    def hard(self) -> bool:
        """Whether every open gate is 1."""
        if self.gates.step is not None:
            return {gate for row in self.gates.step for gate in row[self.inside]} <= {0.0, 1.0}
        return bool((self.gates.opened[..., self.inside] == self.ones).all())

    def open_tokens(self, unit: int, rows: int, length: int) -> Tensor:
        """``[B, T]`` on the host."""
        return self.gates.opened[..., self.inside][..., unit].expand(rows, length)

    def tokens(self, unit: int, rows: int, length: int, device: torch.device) -> OpenTokens:
        """Where those are; made once, and used at every step of a route that is kept."""
        key = (unit, rows, length)
        if key not in self._tokens:
            self._tokens[key] = self._found(*key, device)
        return self._tokens[key]

    def _found(self, unit: int, rows: int, length: int, device: torch.device) -> OpenTokens:
        step = self.gates.step
        if step is None or length > 1:
            return OpenTokens(self.open_tokens(unit, rows, length), device)
        opened = [row[self.inside.start + unit] != 0 for row in step]
        return OpenTokens.of_step(opened * (rows // len(opened)), device)


def all_open() -> BlockGates:
    """The gates of a block that everybody takes."""
    return HostGates(torch.ones(1, 1, 1)).of_block(0, 1)
