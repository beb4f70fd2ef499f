"""What is open, as the host must know it to leave blocks and tokens out: one copy a forward, for all blocks.

A block that asks the device whether a gate is open waits for it. The gates of all blocks are known before the first of
them runs, so they are copied once, and every index is made from that copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = {(True, True, True): "open", (False, True, True): "full", (False, False, False): "closed"}


@dataclass(frozen=True)
class BlockGates:
    """The gates of one block's units, ``[B|1, T|1, U]``: ``weight`` where the block is, the others on the host.

    ``kind``: ``open`` (all 1), ``full`` (none 0), ``closed`` (all 0) or ``mixed``. ``opened``: not 0. ``ones``: exactly 1.
    """

    weight: Tensor
    kind: str
    opened: Tensor
    ones: Tensor

    @property
    def hard(self) -> bool:
        """Whether every open gate is 1."""
        return bool((self.opened == self.ones).all())

    def open_tokens(self, unit: int, rows: int, length: int) -> Tensor:
        """``[B, T]`` on the host."""
        return self.opened[..., unit].expand(rows, length)


class HostGates:
    """The host's copy of a forward's gates ``[B|1, T|1, G]``."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.detach()
        self.opened, self.ones = torch.stack([weight != 0, weight == 1]).cpu()
        every, some = self.opened.flatten(0, 1).all(0), self.opened.flatten(0, 1).any(0)
        one = self.ones.flatten(0, 1).all(0)
        asked = torch.stack([one, some, every], 1).tolist()
        self._kinds = [NAMES.get((row[0], row[1], row[2]), "mixed") for row in asked]

    def kind(self, first: int, last: int) -> str:
        """Of gates ``[first, last)`` together; see ``BlockGates``."""
        found = set(self._kinds[first:last])
        return found.pop() if len(found) == 1 else "mixed"

    def of_block(self, weight: Tensor, first: int, last: int) -> BlockGates:
        """Gates ``[first, last)`` of ``weight``, from which this copy was made."""
        inside = slice(first, last)
        return BlockGates(
            weight[..., inside], self.kind(first, last), self.opened[..., inside], self.ones[..., inside]
        )


def all_open() -> BlockGates:
    """The gates of a block that everybody takes."""
    one = torch.ones(1, 1, 1)
    return BlockGates(one, "open", one.bool(), one.bool())
