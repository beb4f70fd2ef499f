"""The gates of one forward, what deciding them depends on, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headgate.errors import ModelError
from headgate.methods.context import Context, Memory
from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.opened import HostGates
from headgate.ops.gating import straight_through


@dataclass
class Route:
    """Gates of one forward.

    ``weight`` ``[B|1, T|1, G]``; ``logits`` ``[B, T, G]``, ``[1, D, G]`` or ``[1, 1, G]`` as the router gave them;
    ``routed`` ``[B, T]``: real tokens whose gates the route decides (not a prefix at full depth); ``all_free``: those are all
    of them.
    """

    weight: Tensor
    context: Context
    logits: Tensor | None = None
    log_prob: Tensor | None = None
    member: Tensor | None = None
    routed: Tensor | None = None
    all_free: bool = False
    memory: Memory | None = None
    _host: HostGates | None = None

    @property
    def free(self) -> Tensor | None:
        """Real tokens whose gates the route decides; None where every gate was decided in an earlier forward.

        A decoding step never asks, and then need not know which tokens are real.
        """
        return self.context.valid if self.all_free else self.routed

    @property
    def on_host(self) -> HostGates:
        """The host's copy of the gates; the device is asked once a forward, for all of them."""
        if self._host is None:
            self._host = HostGates(self.weight)
        return self._host


@dataclass
class Situation:
    """What a decision depends on besides its features."""

    training: bool
    temperature: float
    threshold: Tensor
    salt: int
    streams: Callable[[], torch.Generator]
    shuffled: bool = False
    share: float = 1.0
    """P(open) of the random control, or the capacity of topk."""
    fixed: Tensor = field(default_factory=lambda: torch.ones(1))
    """Gates of truncate and static; drop probabilities of stochastic_depth."""
    noise: float = 1.0
    """Scale of the logistic noise of Gumbel gates."""
    per_gate: Tensor = field(default_factory=lambda: torch.ones(1))
    """What each gate is worth of the whole depth, ``[G]``."""
    routed: float = 1.0
    """What all gates together may open of the whole depth where the budget is exact."""


@dataclass
class Settled(Memory):
    """A document's mean is complete, so its route is too: ``gates`` ``[B, 1, G]`` of every token from here on."""

    gates: HostGates

    def reordered(self, rows: Tensor) -> Settled:
        return Settled(self.total[rows], self.count[rows], HostGates(self.gates.weight[rows]))


def fixed_route(mask: Tensor, context: Context) -> Route:
    """The same gates ``[G]`` for every token."""
    return Route(mask.view(1, 1, -1), context)


def settled_route(context: Context) -> Route | None:
    """The route of texts whose prefixes lie in the cache: as it was decided, no router asked; None before that."""
    memory = context.memory
    if not isinstance(memory, Settled):
        return None
    return Route(memory.gates.weight, context, memory=memory, _host=memory.gates)


def soft_weight(route: Route, policy: str, temperature: float) -> Tensor:
    """Gates with a gradient for the budget, ``[B|1, T|1, G]``: topk's membership is soft by its logits."""
    if policy != "topk" or route.member is None or route.logits is None:
        return route.weight
    return straight_through(route.member.float(), torch.sigmoid(route.logits / temperature))


def entries(route: Route, config: LayerRoutingConfig, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a threshold decides: effective logits ``[N]``, what each is worth, which count, and what runs whatever it is.

    Worth is in utilization times real tokens. A monotone gate is open where the least of its logits so far is.
    """
    assert route.logits is not None and route.free is not None
    logits = route.logits.detach()
    if config.policy == "exit":
        logits = along_depth(logits, config.gates_per_block, lambda x: x.cummin(-1).values)
    free, context = route.free, route.context
    share = share.to(logits)
    always = (context.valid.sum() - free.sum()) * share.sum()
    if logits.shape[:2] == free.shape and route.memory is None:
        counted = free.unsqueeze(-1).expand_as(logits)
        return logits.flatten(), share.expand_as(logits).flatten(), counted.flatten(), always
    tokens = logits.new_zeros(context.num_documents)
    tokens = tokens.index_add(0, context.document.flatten(), free.flatten().to(logits)).unsqueeze(-1)
    counted = (tokens > 0).expand_as(logits[0])
    return logits[0].flatten(), (tokens * share).flatten(), counted.flatten(), always


def along_depth(gates: Tensor, units: int, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """A rule over successive blocks, applied to each unit of a block by itself."""
    per_unit = gates.unflatten(-1, (-1, units)).transpose(-1, -2)
    return rule(per_unit).transpose(-1, -2).flatten(-2)


def refuse_shuffled_decoding(context: Context, shuffled: bool) -> None:
    if shuffled and context.past:
        raise ModelError(
            "routing shuffled is a control for teacher-forced evaluation, it cannot follow a cache: "
            "use routing on to generate"
        )
