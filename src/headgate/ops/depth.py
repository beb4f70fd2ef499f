"""How deep tokens go: utilization, the budgets that hold it, thresholds, and whether depth depends on the token.

Utilization is a share of *all* blocks, over real tokens. Legend: B batch, T tokens, R gates, N entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.ops.routing_losses import flat_mean


def utilization(gate_BTR: Tensor, valid_BT: Tensor, share_R: Tensor, always: float) -> Tensor:
    """``always + sum_r share_r mean g_r``: ``share_r`` is what gate r is worth of the whole depth.

    Equation: layer_routing (utilization): u = always + sum_r share_r mean g_r, over real tokens
    Proved by: tests/layer_routing/test_laws.py::test_utilization_counts_real_tokens_of_all_blocks
    """
    mean_R = flat_mean(gate_BTR.expand(*valid_BT.shape, -1), valid_BT)
    return always + (mean_R * share_R.to(mean_R)).sum()


def lagrangian(used: Tensor, target: float, dual: Tensor, damping: float) -> Tensor:
    """lambda (u - t) + rho / 2 (u - t)^2: an augmented Lagrangian of u = t (Hestenes 1969).

    The quadratic term damps the swing of dual ascent; the fixed point is that of the dual alone.

    Equation: layer_routing (budget lagrangian): lambda (u - t) + rho / 2 (u - t)^2
    Proved by: tests/ops/test_depth.py::test_the_lagrangian_and_its_slope
    Proved by: tests/layer_routing/test_laws.py::test_dual_ascent_holds_the_target_and_budgets_have_their_gradients
    """
    gap = used - target
    return dual.detach() * gap + 0.5 * damping * gap.square()


def dual_ascent(dual: Tensor, used: Tensor, target: float, rate: float) -> Tensor:
    """lambda <- lambda + rate (u - t); negative when the target asks for more depth than the loss does.

    Equation: layer_routing (budget lagrangian): lambda <- lambda + eta (u - t)
    Proved by: tests/layer_routing/test_laws.py::test_dual_ascent_holds_the_target_and_budgets_have_their_gradients
    """
    return dual + rate * (used.detach() - target)


def depth_penalty(mean_R: Tensor, weight: float) -> Tensor:
    """lambda sum_l w_l mean g_l, w rising linearly with depth from 0 to 1 (the seed's compute penalty).

    Equation: layer_routing (budget penalty): lambda sum_l w_l mean g_l, w rising linearly from 0 to 1
    Proved by: tests/layer_routing/test_laws.py::test_dual_ascent_holds_the_target_and_budgets_have_their_gradients
    """
    rising_R = torch.linspace(0, 1, len(mean_R), device=mean_R.device) if len(mean_R) > 1 else mean_R * 0 + 1
    return weight * (rising_R * mean_R).sum()


def target_penalty(used: Tensor, target: float, weight: float) -> Tensor:
    """kappa (skip - target skip)^2.

    Equation: layer_routing (budget target): kappa (skip - target skip)^2
    Proved by: tests/layer_routing/test_laws.py::test_dual_ascent_holds_the_target_and_budgets_have_their_gradients
    """
    return weight * (used - target).square()


def threshold_for(logit_N: Tensor, worth_N: Tensor, wanted: Tensor, counted_N: Tensor) -> Tensor:
    """The threshold whose open entries (logit above it) are worth ``wanted`` in sum, as nearly as entries allow.

    Half way between two neighbouring logits; beyond the extremes where all or none should be open. Entries that are not
    ``counted_N`` do not exist; NaN where none is. No size depends on them, so no device is waited for.

    Equation: layer_routing (threshold): the t with sum of worth over z > t nearest to what is wanted
    Proved by: tests/layer_routing/test_laws.py::test_threshold_opens_what_is_wanted
    """
    logit_N, worth_N = logit_N.masked_fill(~counted_N, -torch.inf), worth_N.masked_fill(~counted_N, 0)
    order = logit_N.argsort(descending=True)
    sorted_N, total_N = logit_N[order], worth_N[order].cumsum(0)
    upper, lower = sorted_N[:-1], sorted_N[1:]
    half_way = (upper + lower) / 2
    between = torch.where(half_way < upper, half_way, lower)  # of adjacent floats the half is one of the two
    edges = torch.cat([sorted_N[:1] + 1, between, sorted_N[-1:] - 1])
    number = counted_N.sum()
    place = torch.arange(len(edges), device=edges.device)
    least = sorted_N.index_select(0, (number - 1).clamp(min=0).view(1))
    edges = torch.where(place == number, least - 1, edges)
    reached = torch.cat([total_N.new_zeros(1), total_N])
    missed = (reached - wanted).abs().masked_fill(place > number, torch.inf)
    best = edges.index_select(0, missed.argmin().view(1))[0]
    return torch.where(number > 0, best, torch.nan)


def binary_entropy(p: Tensor) -> Tensor:
    """-p ln p - (1 - p) ln (1 - p), in nats."""
    return -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)


def adaptivity(open_BTR: Tensor, valid_BT: Tensor) -> Tensor:
    """I(gate; token) = H(E p) - E H(p) per gate, in nats, [R]: 0 for a static mask, ln 2 at most.

    Equation: layer_routing (adaptivity): I(gate; token) = H(E p) - E H(p)
    Proved by: tests/layer_routing/test_laws.py::test_adaptivity_is_mutual_information
    Proved by: tests/ops/test_depth.py::test_adaptivity_of_soft_gates_is_their_mutual_information
    """
    open_BTR = open_BTR.expand(*valid_BT.shape, -1)
    return binary_entropy(flat_mean(open_BTR, valid_BT)) - flat_mean(binary_entropy(open_BTR), valid_BT)
