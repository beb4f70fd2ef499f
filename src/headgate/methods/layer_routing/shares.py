"""What gates are worth: utilization and executed FLOPs of a route, as shares of the whole depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.route import Route
from headgate.models.anatomy import Anatomy
from headgate.models.flops import BlockFlops
from headgate.ops.depth import utilization
from headgate.ops.routing_losses import flat_mean

FRACTIONAL = ("topk", "stochastic_depth")
"""Policies whose open gates are below 1, so that a patch acts on every token."""


@dataclass(frozen=True)
class Shares:
    """In matrix-product FLOPs of a token; attention and MLP share a block's worth by theirs.

    Attributes:
        per_gate: of the whole depth, ``[G]``. always: of the blocks without a gate.
        keys_values: of one block, what it costs to make keys and values.
        patch: of one block, what a closed unit's patch costs; 0 without one.
        first_forward: forwards that the router's features cost, in training and at inference.
        num_blocks: of the model.
    """

    per_gate: Tensor
    always: float
    keys_values: float
    first_forward: float
    num_blocks: int
    patch: float = 0.0

    @classmethod
    def of(cls, config: LayerRoutingConfig, anatomy: Anatomy, blocks: Sequence[int]) -> Shares:
        flops = BlockFlops.of(anatomy)
        attention = flops.attention / flops.block
        per_unit = [1.0] if config.gates_per_block == 1 else [attention, 1 - attention]
        patch = config.patch.rank if config.patch is not None else 0
        return cls(
            per_gate=torch.tensor(per_unit * len(blocks)) / anatomy.num_blocks,
            always=1 - len(blocks) / anatomy.num_blocks,
            keys_values=flops.keys_values / flops.block,
            first_forward=1.0 if config.features == "prepass" else 0.0,
            num_blocks=anatomy.num_blocks,
            patch=2.0 * 2 * anatomy.hidden_size * patch / flops.block,
        )

    def of_gates(self, target: float) -> float:
        """The share of the gates that is open where ``target`` of all blocks is."""
        return (target - self.always) / max(1 - self.always, 1e-9)

    def used(self, route: Route, weight: Tensor | None = None) -> Tensor:
        """Share of all blocks that the route opens on real tokens; of ``weight``, with its gradient."""
        weight = (route.weight != 0).float() if weight is None else weight
        return utilization(weight, route.context.valid, self.per_gate, self.always)

    def used_at(self, rates: Tensor) -> Tensor:
        """Share of all blocks where every gate is open at its rate, ``[G]``."""
        return self.always + (rates * self.per_gate.to(rates)).sum()

    def executed(self, rates: Tensor, config: LayerRoutingConfig, engine: str) -> float | Tensor:
        """Share of the blocks' FLOPs that runs at these open rates: all of them under ``masked``, patches besides."""
        everywhere = engine == "masked" or config.policy in FRACTIONAL
        patched = (len(rates) if everywhere else (1 - rates).sum()) * self.patch / self.num_blocks
        if engine == "masked":
            return 1.0 + patched
        used = self.used_at(rates)
        if config.routes_per != "token" or config.kv != "full":
            return patched + used
        attention = rates[:: config.gates_per_block]
        # of a block that is closed to every token nobody asks for keys and values
        closed = torch.where(attention > 0, 1 - attention, 0).sum()
        return patched + used + closed * self.keys_values / self.num_blocks


def open_rates(route: Route) -> Tensor:
    """How often each gate is open on real tokens, ``[G]``."""
    valid = route.context.valid
    return flat_mean((route.weight != 0).float().expand(*valid.shape, -1), valid)
