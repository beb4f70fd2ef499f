"""What a router is taught and how it is watched: tag supervision, balance, z-loss, entropies, load.

Every mean is over real tokens only: ``valid_BT`` is False on pads, which change no loss and no statistic.

Legend: B batch, T tokens, N experts, D documents (= B without packing), L tags per document.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def token_mean(values_BTN: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean over the real tokens of each row, [B, N]; zero for a row without any."""
    mask_BT1 = valid_BT.unsqueeze(-1)
    total_BN = torch.where(mask_BT1, values_BTN, 0).sum(1)
    return total_BN / mask_BT1.sum(1).clamp(min=1)


def document_mean(values_BTN: Tensor, segment_BT: Tensor, num_documents: int) -> Tensor:
    """Mean over the tokens of each packed document, [D, N]; ``segment_BT`` is 0..D-1, negative on pads."""
    valid_M = segment_BT.reshape(-1) >= 0
    index_M = segment_BT.reshape(-1)[valid_M]
    rows_MN = values_BTN.flatten(0, 1)[valid_M]
    total_DN = rows_MN.new_zeros(num_documents, rows_MN.shape[-1]).index_add(0, index_M, rows_MN)
    count_D = torch.bincount(index_M, minlength=num_documents).clamp(min=1)
    return total_DN / count_D.unsqueeze(-1)


def tag_cross_entropy(mean_logits_DN: Tensor, tags_DL: Tensor, kept_D: Tensor) -> Tensor:
    """-log p_t of the token-mean logits, over the examples whose tag is given (SchemaBank eq. 8, 10).

    ``tags_DL`` holds -1 where there is no tag; several tags share the loss of their example equally. The sum
    is divided by *all* D examples: the lambda_tag in {0, 1} of eq. 10 zeroes an example, it does not reweigh
    the others, and a batch equals the accumulation of its examples.

    Equation: schema_bank (8): L_tag = -log p_t
    Proved by: tests/ops/test_routing_losses.py::test_tag_loss_is_cross_entropy_of_the_mean_logits_of_kept_examples
    """
    present_DL = (tags_DL >= 0) & kept_D.unsqueeze(-1)
    log_probs_DN = torch.log_softmax(mean_logits_DN, dim=-1)
    nll_DL = -log_probs_DN.gather(-1, tags_DL.clamp(min=0)) * present_DL
    per_example_D = nll_DL.sum(-1) / present_DL.sum(-1).clamp(min=1)
    return per_example_D.mean()


def tag_alignment(mean_logits_DN: Tensor, tags_DL: Tensor, k: int) -> Tensor:
    """Share of tagged examples with a tag among the k best schemas of the token-mean logits (NaN: no tags)."""
    best_DK = mean_logits_DN.topk(k, dim=-1).indices
    tagged_D = (tags_DL >= 0).any(-1)
    hit_D = (best_DK.unsqueeze(-1) == tags_DL.unsqueeze(1)).flatten(1).any(-1) & tagged_D
    return hit_D.sum() / tagged_D.sum()


def load_balance(probs_BTN: Tensor, weight_BTN: Tensor, valid_BT: Tensor) -> Tensor:
    """N sum_i f_i P_i (Switch, eq. 4-6): f = share of dispatches, no gradient; P = mean probability.

    f sums to 1 for any number of choices per token; the loss is 1 at perfect balance. Not yet weighted.

    Equation: lora_experts (balance): alpha N sum_i f_i P_i
    Proved by: tests/ops/test_routing_losses.py::test_balance_is_one_when_balanced_and_grows_towards_n
    Proved by: tests/lora_experts/test_training.py::test_orthogonality_and_balance_are_their_formulas
    """
    share_N = expert_load(weight_BTN.detach() > 0, valid_BT)
    mean_N = flat_mean(probs_BTN, valid_BT)
    return share_N.numel() * (share_N * mean_N).sum()


def router_z_loss(logits_BTN: Tensor, valid_BT: Tensor) -> Tensor:
    """mean (logsumexp z)^2 (ST-MoE, eq. 5): keeps logits small. Not yet weighted.

    Equation: lora_experts (z-loss): mean (logsumexp z)^2
    Proved by: tests/ops/test_routing_losses.py::test_z_loss_is_the_mean_squared_logsumexp_of_real_tokens
    """
    squared_BT1 = torch.logsumexp(logits_BTN, dim=-1, keepdim=True).square()
    return flat_mean(squared_BT1, valid_BT).squeeze(-1)


def flat_mean(values_BTN: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean over all real tokens, [N]."""
    valid_BT1 = valid_BT.expand(values_BTN.shape[:2]).unsqueeze(-1)
    return torch.where(valid_BT1, values_BTN, 0).sum((0, 1)) / valid_BT1.sum().clamp(min=1)


def expert_load(weight_BTN: Tensor, valid_BT: Tensor) -> Tensor:
    """Share of the gate mass per expert, [N], summing to 1; of a boolean ``weight > 0``, of the dispatches."""
    mass_N = flat_mean(weight_BTN.float() if weight_BTN.dtype == torch.bool else weight_BTN, valid_BT)
    return mass_N / mass_N.sum().clamp(min=torch.finfo(torch.float32).tiny)


def entropy(probs_N: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, in nats."""
    return -torch.special.xlogy(probs_N, probs_N).sum(-1)


class RoutingEntropy(NamedTuple):
    """In nats. ``of_mean - mean_of`` is the mutual information of expert and token: 0 for a static router."""

    of_mean: Tensor
    mean_of: Tensor
    of_mean_normalised: Tensor
    mean_of_normalised: Tensor


def routing_entropy(probs_BTN: Tensor, valid_BT: Tensor) -> RoutingEntropy:
    """H(E p) (is every expert used?) and E H(p) (is each token sure?), in nats and as a share of ln N.

    Equation: lora_experts (entropies): lambda_1 mean H(p_t) - lambda_2 H(mean p)
    Proved by: tests/ops/test_routing_losses.py::test_entropies_are_bounded_and_ordered
    """
    of_mean = entropy(flat_mean(probs_BTN, valid_BT))
    mean_of = flat_mean(entropy(probs_BTN).unsqueeze(-1), valid_BT).squeeze(-1)
    limit = math.log(max(probs_BTN.shape[-1], 2))
    return RoutingEntropy(of_mean, mean_of, of_mean / limit, mean_of / limit)


def reinforce_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """REINFORCE: -mean(advantage * log p), whose gradient estimates that of -E[reward].

    Equation: layer_routing (reinforce): L = -mean((baseline - cost) log p(g)), cost = CE + price
    Proved by: tests/layer_routing/test_laws.py::test_reinforce_is_the_gradient_of_expected_cost
    Proved by: tests/ops/test_routing_losses.py::test_reinforce_estimates_the_gradient_of_expected_reward
    """
    return -(advantage.detach() * log_prob).mean()
