"""Logits -> Gates: nonnegative weights that multiply something, and what made them.

Granularity is the broadcast shape: [1,1,N] decides for a batch, [B,1,N] for a sample, [B,T,N] for a token.
Half-precision logits are read in fp32. Ties of a top-k go where `torch.topk` sends them.

Legend: B batch, T tokens, N experts (or schemas, or blocks), K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """``weight`` and ``logits`` are [B|1, T|1, N].

    ``chosen`` [.., K] indexes the only gates that can be non-zero (top-k); None means that all can.
    """

    weight: Tensor
    logits: Tensor
    chosen: Tensor | None = None


def at_least_fp32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def softmax_gates(logits_BTN: Tensor, temperature: float = 1.0) -> Gates:
    """g = softmax(z / t): dense, every expert contributes."""
    logits_BTN = at_least_fp32(logits_BTN)
    return Gates(torch.softmax(logits_BTN / temperature, dim=-1), logits_BTN)


def keep_top_k(probs_BTN: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The k largest probabilities in place, zero elsewhere, and their indices.

    With k = 1 the winner keeps its probability: renormalised it is the constant 1 and gives no gradient.
    """
    values_BTK, chosen_BTK = probs_BTN.topk(k, dim=-1)
    if renormalise and k > 1:
        values_BTK = values_BTK / values_BTK.sum(-1, keepdim=True)
    return torch.zeros_like(probs_BTN).scatter(-1, chosen_BTK, values_BTK), chosen_BTK


def top_k_gates(logits_BTN: Tensor, k: int, renormalise: bool = True, temperature: float = 1.0) -> Gates:
    """g = p over the top-k of p = softmax(z / t), renormalised to sum 1 when k >= 2 (SchemaBank eq. 2-3).

    Equation: schema_bank (2, 3): p = softmax(W h); g = p over the top-k, renormalised to sum 1 where k >= 2
    Proved by: tests/ops/test_gating.py::test_top_k_keeps_the_largest_and_sums_to_one
    Proved by: tests/ops/test_gating.py::test_top_one_gives_the_router_a_gradient
    """
    logits_BTN = at_least_fp32(logits_BTN)
    probs_BTN = torch.softmax(logits_BTN / temperature, dim=-1)
    weight_BTN, chosen_BTK = keep_top_k(probs_BTN, k, renormalise)
    return Gates(weight_BTN, logits_BTN, chosen_BTK)


def adaptive_top_k_gates(
    logits_BTN: Tensor, k_max: int, mass: float = 0.9, renormalise: bool = True, temperature: float = 1.0
) -> Gates:
    """The smallest k <= k_max whose probabilities sum to ``mass``: few experts where the router is sure.

    The i-th largest stays while the mass before it is below ``mass``. A lone survivor keeps its probability.

    Equation: schema_bank (adaptive k): k = min { k <= k_max : p_(1) + ... + p_(k) >= mass }
    Proved by: tests/ops/test_gating.py::test_adaptive_takes_the_smallest_sufficient_k
    """
    logits_BTN = at_least_fp32(logits_BTN)
    values_BTK, chosen_BTK = torch.softmax(logits_BTN / temperature, dim=-1).topk(k_max, dim=-1)
    kept_BTK = (values_BTK.cumsum(-1) - values_BTK) < mass
    values_BTK = values_BTK * kept_BTK
    if renormalise:
        several_BT1 = kept_BTK.sum(-1, keepdim=True) > 1
        values_BTK = torch.where(several_BT1, values_BTK / values_BTK.sum(-1, keepdim=True), values_BTK)
    weight_BTN = torch.zeros_like(logits_BTN).scatter(-1, chosen_BTK, values_BTK)
    return Gates(weight_BTN, logits_BTN, chosen_BTK)


def maturity_gates(
    logits_BTN: Tensor,
    maturity_N: Tensor,
    temperature: float = 1.0,
    k: int | None = None,
    young: Sequence[int] = (),
) -> Gates:
    """g_i proportional to m_i exp(z_i / t), over all experts or the top-k of them (k = 1: not renormalised).

    An expert of maturity 0 has weight exactly 0 and leaves every other gate as if it were not there. With k, the places
    ``young`` take part beside the top-k of the others: a young expert could not win its first tokens, and its small m
    makes the change continuous.

    Equation: lora_experts (gates): g_i proportional to m_i exp(z_i / tau), over all or the top-k
    Proved by: tests/ops/test_gating.py::test_maturity_is_proportional
    Proved by: tests/ops/test_gating.py::test_an_unborn_expert_changes_no_gate
    Proved by: tests/ops/test_gating.py::test_young_experts_take_part_beside_the_top_k_of_the_others
    """
    logits_BTN = at_least_fp32(logits_BTN)
    scaled_BTN = logits_BTN / temperature + maturity_N.to(logits_BTN.dtype).log()
    probs_BTN = torch.softmax(scaled_BTN, dim=-1)
    if k is None or k + len(young) >= probs_BTN.shape[-1]:
        return Gates(probs_BTN, logits_BTN)
    if not young:
        weight_BTN, chosen_BTK = keep_top_k(probs_BTN, k, renormalise=True)
        return Gates(weight_BTN, logits_BTN, chosen_BTK)
    young_Y = torch.tensor(list(young), device=probs_BTN.device)
    top_BTK = probs_BTN.index_fill(-1, young_Y, -1.0).topk(k, dim=-1).indices
    chosen_BTK = torch.cat([top_BTK, young_Y.expand(*top_BTK.shape[:-1], -1)], dim=-1)
    values_BTK = probs_BTN.gather(-1, chosen_BTK)
    values_BTK = values_BTK / values_BTK.sum(-1, keepdim=True)
    return Gates(torch.zeros_like(probs_BTN).scatter(-1, chosen_BTK, values_BTK), logits_BTN, chosen_BTK)


def uniform_gates(logits_BTN: Tensor) -> Gates:
    """g = 1/N whatever the logits say: the control of a router."""
    return Gates(
        torch.full_like(logits_BTN, 1 / logits_BTN.shape[-1], dtype=torch.float32), logits_BTN.float()
    )


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, bit for bit, with the gradient of ``soft``."""
    return hard.detach() + (soft - soft.detach())


def with_logistic_noise(logits_BTN: Tensor, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """z + scale l, l ~ Logistic: above 0 with probability sigmoid(z / scale)."""
    uniform_BTN = torch.rand(logits_BTN.shape, generator=generator, device=generator.device)
    uniform_BTN = uniform_BTN.to(logits_BTN.device, non_blocking=True).clamp(1e-7, 1 - 1e-7)
    return logits_BTN + scale * uniform_BTN.logit()


def gumbel_gates(
    logits_BTN: Tensor,
    temperature: float,
    generator: torch.Generator | None,
    hard: bool = True,
    scale: float = 1.0,
) -> Gates:
    """s = sigmoid((z + l) / t), l ~ Logistic; hard gates are 1[s > 1/2] with the gradient of s.

    The binary concrete distribution: P(gate open) = sigmoid(z) at every temperature (Maddison et al. 2017,
    appendix B). Without a generator the noise is left out: the deterministic form. ``scale`` multiplies the noise.

    Equation: layer_routing (gumbel): s = sigmoid((z + l) / t), l ~ Logistic; g = 1[s > 1/2], gradient of s
    Proved by: tests/ops/test_gating.py::test_gumbel_opens_with_probability_sigmoid_at_every_temperature
    Proved by: tests/ops/test_gating.py::test_straight_through_has_the_value_of_hard_and_the_gradient_of_soft
    """
    logits_BTN = at_least_fp32(logits_BTN)
    noisy_BTN = logits_BTN
    if generator is not None:
        noisy_BTN = with_logistic_noise(logits_BTN, generator, scale)
    soft_BTN = torch.sigmoid(noisy_BTN / temperature)
    if not hard:
        return Gates(soft_BTN, logits_BTN)
    return Gates(straight_through((soft_BTN > 0.5).to(soft_BTN.dtype), soft_BTN), logits_BTN)


def threshold_gates(logits_BTN: Tensor, threshold: float | Tensor = 0.0) -> Gates:
    """g = 1[z > threshold]: the deterministic gate of evaluation."""
    logits_BTN = at_least_fp32(logits_BTN)
    return Gates((logits_BTN > threshold).to(logits_BTN.dtype), logits_BTN)


def bernoulli_gates(logits_BTN: Tensor, generator: torch.Generator) -> tuple[Gates, Tensor]:
    """g ~ Bernoulli(sigmoid(z)) and log p(g) [B|1, T|1], summed over N, with its gradient (REINFORCE).

    log p(g) = -sum softplus((1 - 2g) z): exact for any logit, where log(sigmoid) would underflow.

    Equation: layer_routing (reinforce): log p(g) = -sum softplus((1 - 2 g) z)
    Proved by: tests/ops/test_gating.py::test_bernoulli_log_prob_is_exact_and_its_score_has_mean_zero
    """
    logits_BTN = at_least_fp32(logits_BTN)
    uniform_BTN = torch.rand(logits_BTN.shape, generator=generator, device=generator.device)
    uniform_BTN = uniform_BTN.to(logits_BTN.device, non_blocking=True)
    weight_BTN = (uniform_BTN < torch.sigmoid(logits_BTN)).to(logits_BTN.dtype).detach()
    log_prob_BT = -torch.nn.functional.softplus((1 - 2 * weight_BTN) * logits_BTN).sum(-1)
    return Gates(weight_BTN, logits_BTN), log_prob_BT


def capacity_mask(gates: Gates, valid_BT: Tensor, capacity: int) -> tuple[Gates, Tensor]:
    """At most ``capacity`` tokens per expert, first come first served; and the share of dispatches dropped.

    Pads take no place. A dropped gate is zero and is not made up for: the token falls back to the base model.

    Equation: lora_experts (capacity): at most C = ceil(cf k T / N) tokens an expert; the rest go to the base
    Proved by: tests/ops/test_gating.py::test_capacity_serves_the_first_and_never_a_pad
    Proved by: tests/lora_experts/test_laws.py::test_capacity_binds_in_training_only_and_drops_to_the_base
    """
    asked_BTN = (gates.weight > 0) & valid_BT.unsqueeze(-1)
    place_BTN = asked_BTN.flatten(0, 1).cumsum(0).view_as(asked_BTN)
    kept_BTN = asked_BTN & (place_BTN <= capacity)
    dropped = 1 - kept_BTN.sum() / asked_BTN.sum().clamp(min=1)
    weight_BTN = gates.weight * (kept_BTN | ~valid_BT.unsqueeze(-1))
    return gates._replace(weight=weight_BTN), dropped * (asked_BTN.sum() > 0)
