"""What layer_routing trains: a router where its policy has one, and patches on skipped paths; their groups and rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from headgate.methods.layer_routing.config import LEARNED, LayerRoutingConfig
from headgate.modules.layer_router import LayerRouter
from headgate.modules.patch import Patch
from headgate.ops.randomness import generator

ROUTER, PATCH = "layer_router", "layer_patch"


def build_router(config: LayerRoutingConfig, hidden_size: int, gates: int, seed: int) -> LayerRouter | None:
    """A router of ``gates`` outputs; None for a policy that decides by a rule."""
    if config.policy not in LEARNED:
        return None
    return LayerRouter(
        hidden_size,
        gates,
        init_keep=config.init_keep,
        trunk_gradient=config.trunk_gradient,
        bound=config.logit_bound,
        generator=generator(seed, 0, "layer_routing.init"),
    )


def build_patches(config: LayerRoutingConfig, hidden_size: int, gates: int, seed: int) -> list[Patch]:
    """One patch a gate; none where the configuration has none."""
    if config.patch is None:
        return []
    stream = generator(seed, 0, "layer_routing.patch")
    return [Patch(hidden_size, config.patch.rank, generator=stream) for _ in range(gates)]


def groups(
    router: LayerRouter | None, patches: nn.ModuleList, config: LayerRoutingConfig
) -> Mapping[str, Sequence[nn.Parameter]]:
    """Parameter groups by name."""
    trained = {ROUTER: list(router.parameters())} if router is not None else {}
    return {**trained, PATCH: list(patches.parameters())} if config.patch is not None else trained


def rates(config: LayerRoutingConfig, learning_rate: float) -> Mapping[str, float]:
    """The router has a rate of its own; patches train like the adapter."""
    own = {ROUTER: config.router_lr} if config.policy in LEARNED else {}
    return {**own, PATCH: learning_rate} if config.patch is not None else own
