"""From features to gates: what each policy decides in training, and what at inference.

Every gate of a token depends on that token and earlier ones only, except in the training-time forms of
``reinforce`` (the whole batch) and ``topk`` (the whole row), which have a causal form at inference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.methods.context import Context, Memory
from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.opened import HostGates
from headgate.methods.layer_routing.route import Route, Settled, Situation, along_depth, entries, fixed_route
from headgate.ops.depth import binary_entropy
from headgate.ops.exact_budget import exact_gates
from headgate.ops.gating import (
    bernoulli_gates,
    gumbel_gates,
    threshold_gates,
    with_logistic_noise,
)
from headgate.ops.layer_gates import drop_rates, hashed_uniform, monotone, prefix_sums, top_tokens
from headgate.ops.routing_losses import flat_mean


def decide(
    config: LayerRoutingConfig, router: nn.Module | None, hidden: Tensor, context: Context, now: Situation
) -> Route:
    """The route of a forward; ``hidden`` ``[B, T, H]`` is what the router reads."""
    policy = config.policy
    if policy in ("truncate", "static"):
        return fixed_route(now.fixed.to(hidden.device), context)
    if policy == "stochastic_depth":
        return Route(_stochastic_depth(now, config.scaling).to(hidden.device), context)
    if policy == "random":
        return _random(config, context, now)
    assert router is not None
    if policy == "reinforce" and now.training:
        pooled = flat_mean(hidden, context.valid).view(1, 1, -1)
        gates, log_prob = bernoulli_gates(router(pooled), now.streams())
        return Route(gates.weight, context, gates.logits, log_prob)
    if config.routes_per == "token":
        logits = router(hidden)
        if now.training and config.budget == "exact":  # what is exported holds no budget
            return _exact(Route(logits, context, logits, all_free=True), config, now)
        weight, member = _token_gates(config, logits, context, now)
        if now.shuffled and not now.training:
            weight = _shuffled(weight, context.valid, now)
        return Route(weight, context, logits, member=member, all_free=True)
    return _per_document(config, router, hidden, context, now)


def fixed_gates(config: LayerRoutingConfig, num_blocks: int) -> Tensor:
    """Gates ``[G]`` of truncate, static and a given start (open, before a mask is found); drop probabilities of stochastic_depth."""
    blocks = config.routable(num_blocks)
    gates_R = torch.ones(len(blocks))
    if config.policy == "stochastic_depth":
        gates_R = drop_rates(num_blocks, blocks.start, config.drop_rate, config.schedule)[: len(blocks)]
    elif config.policy == "truncate":
        gates_R[len(blocks) - config.num_skipped(num_blocks) :] = 0.0
    elif config.skip is not None:
        gates_R[[block - blocks.start for block in config.skip]] = 0.0
    return gates_R.repeat_interleave(config.gates_per_block)


def _stochastic_depth(now: Situation, scaling: bool) -> Tensor:
    """A Bernoulli draw per block and batch; at inference x + (1 - p)(F(x) - x), or full depth unscaled."""
    if now.training:
        drawn = torch.rand(now.fixed.shape, generator=now.streams()) >= now.fixed.cpu()
        return drawn.float().view(1, 1, -1)
    return (1 - now.fixed if scaling else torch.ones_like(now.fixed)).view(1, 1, -1)


def _token_gates(
    config: LayerRoutingConfig, logits: Tensor, context: Context, now: Situation
) -> tuple[Tensor, Tensor | None]:
    if config.policy == "topk":
        scale = torch.sigmoid(logits)
        if now.training:
            member = top_tokens(logits, context.valid, now.share)
            return scale * member, member
        return scale * (logits > now.threshold), None
    if now.training:
        weight = gumbel_gates(logits, now.temperature, now.streams(), scale=now.noise).weight
    else:
        weight = threshold_gates(logits, now.threshold).weight
    if config.policy == "exit":
        weight = along_depth(weight, config.gates_per_block, monotone)
    return weight, None


def _prefix(context: Context, length: int) -> Tensor:
    return context.valid & (context.offset < length)


def _with_memory(total: Tensor, count: Tensor, context: Context) -> Memory:
    context.needs_memory("a route per document")
    if context.memory is not None:
        return Memory(context.memory.total + total, context.memory.count + count)
    return Memory(total, count)


def _kept(memory: Memory, gates: Tensor, context: Context, length: int, *, training: bool) -> Memory:
    """``memory``, with the gates ``[B, G]`` where no later token can change them: every row has its whole prefix."""
    if training or context.packed or not bool((memory.count >= length).all()):
        return memory
    return Settled(memory.total, memory.count, HostGates(gates.unsqueeze(1)))


def _spread(per_document: Tensor, context: Context, length: int) -> tuple[Tensor, Tensor]:
    """Gates of documents ``[D, G]`` to tokens ``[B, T, G]``; the prefix runs at full depth. And what is routed."""
    opened = _prefix(context, length)
    weight = torch.where(opened.unsqueeze(-1), 1.0, per_document[context.document])
    return weight, context.valid & ~opened


def _per_document(
    config: LayerRoutingConfig, router: nn.Module, hidden: Tensor, context: Context, now: Situation
) -> Route:
    """One route a document, read off the mean of its first ``prefix_tokens`` tokens and fixed from then on."""
    length = config.prefix_tokens
    prefix = _prefix(context, length)
    total, count = prefix_sums(hidden.float(), context.document, prefix, context.num_documents)
    memory = _with_memory(total, count, context)
    pooled = memory.total / memory.count.clamp(min=1).unsqueeze(-1)
    logits = router(pooled.unsqueeze(0))
    if now.training and config.budget == "exact":  # what is exported holds no budget
        free = context.valid & ~_prefix(context, length)
        route = _exact(Route(logits, context, logits, routed=free, memory=memory), config, now)
        route.weight, route.routed = _spread(route.weight[0], context, length)
        return route
    if now.training:
        weight = gumbel_gates(logits, now.temperature, now.streams(), scale=now.noise).weight[0]
    else:
        weight = threshold_gates(logits, now.threshold).weight[0]
    if now.shuffled and not now.training:
        weight = _shuffled(weight, memory.count > 0, now)
    spread, free = _spread(weight, context, length)
    memory = _kept(memory, weight, context, length, training=now.training)
    return Route(spread, context, logits, routed=free, memory=memory)


def _exact(route: Route, config: LayerRoutingConfig, now: Situation) -> Route:
    """Gates of a training batch, as many open as the budget pays for: the threshold is the batch's own."""
    assert route.logits is not None
    _, worth, counted, always = entries(route, config, now.per_gate)
    logits = with_logistic_noise(route.logits, now.streams(), now.noise) if now.noise else route.logits
    wanted = now.routed * route.context.valid.sum() - always
    route.weight = exact_gates(logits.flatten(), worth, counted, wanted, now.temperature).view_as(logits)
    return route


def _random(config: LayerRoutingConfig, context: Context, now: Situation) -> Route:
    """Gates open with probability ``share`` whatever the token: a hash of its id, place and block."""
    ids = context.ids if context.ids is not None else torch.zeros_like(context.offset)
    key = ids * 1_000_003 + context.offset
    count = len(now.fixed)
    if config.routes_per == "token":
        drawn = hashed_uniform(key, count, now.salt) < now.share
        return Route(drawn.float(), context, all_free=True)
    prefix = _prefix(context, config.prefix_tokens)
    marks = hashed_uniform(key, 1, now.salt).double()
    total, seen = prefix_sums(marks, context.document, prefix, context.num_documents)
    memory = _with_memory(total, seen, context)
    drawn = (hashed_uniform((memory.total[:, 0] * (1 << 24)).long(), count, now.salt) < now.share).float()
    spread, free = _spread(drawn, context, config.prefix_tokens)
    memory = _kept(memory, drawn, context, config.prefix_tokens, training=now.training)
    return Route(spread, context, routed=free, memory=memory)


def _shuffled(gates: Tensor, real: Tensor, now: Situation) -> Tensor:
    """Control: the same gates, handed to other tokens (or documents)."""
    ours = gates[real]
    order = torch.randperm(len(ours), generator=now.streams()).to(ours.device)
    shuffled = gates.clone()
    shuffled[real] = ours[order]
    return shuffled


def route_losses(config: LayerRoutingConfig, route: Route) -> dict[str, Tensor]:
    """What a policy itself asks for, weighted: topk's membership learned, the gates' entropy paid for."""
    losses: dict[str, Tensor] = {}
    if config.policy == "topk" and route.member is not None and route.logits is not None:
        real = route.context.valid.unsqueeze(-1).expand_as(route.logits)
        summed = F.binary_cross_entropy_with_logits(
            route.logits, route.member.to(route.logits), real.to(route.logits), reduction="sum"
        )
        losses["routing_member"] = summed / real.sum()
    if config.entropy_bonus and route.logits is not None:
        spread = binary_entropy(torch.sigmoid(route.logits).clamp(1e-6, 1 - 1e-6)).mean()
        losses["routing_entropy"] = -config.entropy_bonus * spread
    return losses
