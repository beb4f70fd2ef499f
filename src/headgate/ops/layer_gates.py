"""Which blocks a token takes: gate rules, each a line of mathematics.

Legend: B batch, T tokens, R routable blocks, D documents (= B without packing), H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated(x: Tensor, fx: Tensor, gate: Tensor) -> Tensor:
    """y = g F(x) + (1 - g) x. With g = 1 it is F(x) and with g = 0 it is x, bit for bit; dy/dg = F(x) - x.

    Equation: layer_routing (function): y = g F(x) + (1 - g) x
    Proved by: tests/layer_routing/test_laws.py::test_gate_rules
    Proved by: tests/layer_routing/test_engines.py::test_masked_gate_gradient_is_exact
    Proved by: tests/layer_routing/test_engines.py::test_sparse_is_masked
    """
    return gate * fx + (1 - gate) * x


def monotone(gate_BTR: Tensor) -> Tensor:
    """prod_{j <= l} g_j: once closed, closed for all later blocks (early exit).

    Equation: layer_routing (exit): g_l <- prod over j <= l of g_j
    Proved by: tests/layer_routing/test_laws.py::test_gate_rules
    Proved by: tests/layer_routing/test_policies.py::test_exit_is_monotone_and_random_holds_its_share
    """
    return gate_BTR.cumprod(-1)


def drop_rates(num_blocks: int, keep: int, rate: float, schedule: str) -> Tensor:
    """Probability that each routable block is dropped, [R]: ``uniform`` p, or ``linear`` p (l - k) / (L - 1 - k).

    Stochastic depth (Huang et al. 2016, section 3), counted over the routable blocks.

    Equation: layer_routing (stochastic depth): p_l = p_max (l - k) / (L - 1 - k), or p_max; x + (1 - p_l) (F(x) - x) at inference
    Proved by: tests/layer_routing/test_laws.py::test_gate_rules
    Proved by: tests/layer_routing/test_policies.py::test_stochastic_depth_scales_by_survival
    """
    place_R = torch.arange(num_blocks - keep, dtype=torch.float32)
    if schedule == "uniform":
        return torch.full_like(place_R, rate)
    return rate * place_R / max(num_blocks - 1 - keep, 1)


def top_tokens(logits_BTR: Tensor, valid_BT: Tensor, share: float) -> Tensor:
    """Membership [B, T, R]: for every row and block the ``ceil(share * real tokens)`` highest logits.

    Mixture-of-Depths (Raposo et al. 2024, section 3.4), its capacity counted over real tokens. Looks at the
    whole row: for training only.

    Equation: layer_routing (topk): the ceil(share n) highest logits of a row, per block
    Proved by: tests/layer_routing/test_laws.py::test_gate_rules
    """
    scored_BTR = logits_BTR.masked_fill(~valid_BT.unsqueeze(-1), -torch.inf)
    rank_BTR = scored_BTR.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    capacity_B11 = torch.ceil(share * valid_BT.sum(1)).view(-1, 1, 1)
    return (rank_BTR < capacity_B11) & valid_BT.unsqueeze(-1)


def hashed_uniform(key: Tensor, count: int, seed: int) -> Tensor:
    """Uniform numbers on [0, 1) as a pure function of (key, index, seed), ``[*key, count]``.

    The finaliser of SplitMix64 (Steele et al. 2014), in wrapping 64-bit arithmetic: the same on every device, in
    every batch and at every decoding step.
    """
    index = torch.arange(count, device=key.device, dtype=torch.int64)
    z = (key.long().unsqueeze(-1) * 0x2545F4914F6CDD1D) + (index + 1) * -0x61C8864680B583EB + seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return (z & ((1 << 24) - 1)).float() / (1 << 24)


def prefix_sums(
    x_BTH: Tensor, document_BT: Tensor, prefix_BT: Tensor, num_documents: int
) -> tuple[Tensor, Tensor]:
    """Sum and number of the prefix tokens of each document: ``([D, H], [D])``."""
    index_N, prefix_N = document_BT.flatten(), prefix_BT.flatten()
    # what is left out adds zero: to pick the others out would make the host wait for their number
    rows_NH = torch.where(prefix_N.unsqueeze(-1), x_BTH.flatten(0, 1), 0)
    sum_DH = rows_NH.new_zeros(num_documents, x_BTH.shape[-1]).index_add(0, index_N, rows_NH)
    count_D = torch.zeros(num_documents, dtype=torch.long, device=index_N.device)
    return sum_DH, count_D.index_add(0, index_N, prefix_N.long())
