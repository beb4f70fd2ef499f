"""Routed low-rank transforms: N experts in two matrix products, without an [.., N, O] tensor.

    y = sum_s g_s (x A_s^T) B_s  =  ((x A^T) * repeat(g, ranks)) B

SchemaBank eq. 4-5 (read with shapes that multiply) and mixtures of LoRA experts are both this sum. Four
routes compute it, all equal to the explicit loop:

* `routed_low_rank` is the equation, differentiated by autograd; it keeps two [.., R] tensors;
* `routed_low_rank_recomputed` keeps only its inputs and walks the tokens in chunks, forward and backward;
* `routed_low_rank_grouped` gathers each expert's tokens first (grouped_low_rank.py), so that work falls by k/N when only k
  gates of a token can be non-zero. It reads the choice on the host, so only CPU tensors take it;
* `routed_low_rank_gathered` copies each token's chosen rows, which for the few tokens of a decoding step is less
  than reading every expert.

`low_rank_bank` picks by shape. Measured at N=32, r=16, H=896, 4,096 tokens, k=2, one core, forward and
backward: expanded einsum 1777 ms, plain 243 ms, recomputed 269 ms, grouped 56 ms.

Legend: B batch, T tokens, M = B*T, I inputs, O outputs, N experts, K chosen experts, R total rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headgate.ops.gathered_low_rank import chosen_rows, gathered_is_faster, gathered_low_rank
from headgate.ops.grouped_low_rank import grouped_experts, grouped_is_faster
from headgate.ops.reduction import Reduction

CHUNK_TOKENS = 512
"""Tokens of one chunk: its [chunk, R] scratch stays in cache, and the products remain large."""

KEEP_BYTES = 8 * 2**20
"""Rank-space activations above this size are recomputed in the backward (about 10% more time), not kept."""


def repeat_ranks(gates_BTN: Tensor, ranks: Sequence[int]) -> Tensor:
    """Gates per expert -> gates per rank row, [.., N] -> [.., R]."""
    if len(set(ranks)) == 1:
        return gates_BTN.repeat_interleave(ranks[0], dim=-1)
    index_R = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(gates_BTN.device)
    return gates_BTN.index_select(-1, index_R)


def routed_low_rank(
    x: Tensor, down_RI: Tensor, up_RO: Tensor, gates_BTN: Tensor, ranks: Sequence[int]
) -> Tensor:
    """sum_s g_s (x A_s^T) B_s over [.., I] inputs; gates broadcast against the leading dimensions.

    Equation: schema_bank (4): delta = sum_s g_s (h U_s) V_s
    Equation: lora_experts (bank): y = W x + ((x A^T) * repeat(g alpha / r, ranks)) B^T
    Proved by: tests/ops/test_low_rank.py::test_two_products_equal_the_loop
    Proved by: tests/lora_experts/test_bank.py::test_the_bank_is_the_loop_over_its_experts
    Proved by: tests/lora_experts/test_laws.py::test_one_expert_is_peft_lora
    """
    return ((x @ down_RI.T) * repeat_ranks(gates_BTN, ranks)) @ up_RO


def sum_ranks(rows_MR: Tensor, ranks: Sequence[int]) -> Tensor:
    """The transpose of `repeat_ranks`: [M, R] -> [M, N]."""
    if len(set(ranks)) == 1:
        return rows_MR.view(rows_MR.shape[0], len(ranks), ranks[0]).sum(-1)
    return torch.stack([part.sum(-1) for part in rows_MR.split(list(ranks), dim=-1)], dim=-1)


class _Recomputed(torch.autograd.Function):
    """The two products in chunks of tokens; the backward computes x A^T again instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, down_RI: Tensor, up_RO: Tensor, gates_MN: Tensor, ranks: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x_MI, down_RI, up_RO, gates_MN)
        ctx.ranks = ranks
        y_MO = x_MI.new_empty(x_MI.shape[0], up_RO.shape[1])
        for start in range(0, x_MI.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            inner_CR = x_MI[rows] @ down_RI.T
            inner_CR *= repeat_ranks(gates_MN[rows], ranks)
            torch.mm(inner_CR, up_RO, out=y_MO[rows])
        return y_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, down_RI, up_RO, gates_MN = ctx.saved_tensors
        want_x, want_down, want_up, want_gates, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x_MI) if want_x else None
        grad_down = torch.zeros_like(down_RI) if want_down else None
        grad_up = torch.zeros_like(up_RO) if want_up else None
        grad_gates = torch.empty_like(gates_MN) if want_gates else None
        for start in range(0, x_MI.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            scale_CR = repeat_ranks(gates_MN[rows], ctx.ranks)
            if grad_up is not None or grad_gates is not None:
                inner_CR = x_MI[rows] @ down_RI.T
            if grad_up is not None:
                grad_up.addmm_((inner_CR * scale_CR).T, grad_MO[rows])
            if grad_x is None and grad_down is None and grad_gates is None:
                continue
            through_CR = grad_MO[rows] @ up_RO.T
            if grad_gates is not None:
                grad_gates[rows] = sum_ranks(inner_CR.mul_(through_CR), ctx.ranks)
            through_CR *= scale_CR
            if grad_x is not None:
                torch.mm(through_CR, down_RI, out=grad_x[rows])
            if grad_down is not None:
                grad_down.addmm_(through_CR.T, x_MI[rows])
        return grad_x, grad_down, grad_up, grad_gates, None


def routed_low_rank_recomputed(
    x: Tensor, down_RI: Tensor, up_RO: Tensor, gates_BTN: Tensor, ranks: Sequence[int]
) -> Tensor:
    """`routed_low_rank` that keeps only its inputs for the backward."""
    gates_MN = gates_BTN.expand(*x.shape[:-1], len(ranks)).reshape(-1, len(ranks))
    y_MO = _Recomputed.apply(x.reshape(-1, x.shape[-1]), down_RI, up_RO, gates_MN, tuple(ranks))
    return y_MO.view(*x.shape[:-1], -1)


def routed_low_rank_grouped(
    x: Tensor, down_RI: Tensor, up_RO: Tensor, gates_BTN: Tensor, chosen_BTK: Tensor, ranks: Sequence[int]
) -> Tensor:
    """`routed_low_rank` over the chosen experts only.

    Gates outside ``chosen_BTK`` must be zero by construction (top-k): they receive no gradient here.
    """
    factors = list(zip(down_RI.split(list(ranks)), up_RO.split(list(ranks)), strict=True))
    weight_BTK = gates_BTN.gather(-1, chosen_BTK.expand(*gates_BTN.shape[:-1], -1))
    return grouped_experts(x, factors, weight_BTK, chosen_BTK)


def routed_low_rank_gathered(
    x: Tensor, down_RI: Tensor, up_RO: Tensor, gates_BTN: Tensor, chosen_BTK: Tensor, ranks: Sequence[int]
) -> Tensor:
    """`routed_low_rank` over a copy of each token's chosen rows: for a decoding step's few tokens.

    Gates outside ``chosen_BTK`` must be zero; ranks are padded to the largest.
    """
    rows = chosen_rows(gates_BTN, chosen_BTK, ranks, x.shape[:-1])
    return gathered_low_rank(x, down_RI, up_RO, rows)


def low_rank_bank(
    x: Tensor,
    down_RI: Tensor,
    up_RO: Tensor,
    gates_BTN: Tensor,
    ranks: Sequence[int],
    chosen_BTK: Tensor | None = None,
) -> Tensor:
    """`routed_low_rank` by the route that suits the shape, the device and the autocast state.

    ``chosen_BTK``: the experts that can have a non-zero gate, where gates are top-k (`gating.Gates.chosen`).
    Weights and gates are cast to the compute type of ``x`` (the autocast type inside an autocast region).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, down_RI, up_RO, gates_BTN = (t.to(dtype) for t in (x, down_RI, up_RO, gates_BTN))
    tokens = x.shape[:-1].numel()
    with torch.autocast(device, enabled=False):
        k = 0 if chosen_BTK is None else chosen_BTK.shape[-1]
        if chosen_BTK is not None and not torch.is_grad_enabled() and gathered_is_faster(tokens, ranks, k):
            return routed_low_rank_gathered(x, down_RI, up_RO, gates_BTN, chosen_BTK, ranks)
        if chosen_BTK is not None and device == "cpu":
            width = down_RI.shape[1] + up_RO.shape[1]
            if grouped_is_faster(tokens, ranks, chosen_BTK.shape[-1], width):
                return routed_low_rank_grouped(x, down_RI, up_RO, gates_BTN, chosen_BTK, ranks)
        if torch.is_grad_enabled() and 2 * tokens * sum(ranks) * x.element_size() > KEEP_BYTES:
            return routed_low_rank_recomputed(x, down_RI, up_RO, gates_BTN, ranks)
        return routed_low_rank(x, down_RI, up_RO, gates_BTN, ranks)


def orthonormality(rows_NRO: Tensor, reduction: Reduction = "mean") -> Tensor:
    """How far each expert's R output rows are from orthonormal: ||B_s B_s^T - I||_F^2, one batched Gram.

    SchemaBank eq. 7 prints V^T V, an [O, O] matrix of rank R that cannot be the identity; B B^T can.
    ``mean``: mean over experts of the mean squared entry; ``sum``: sum over experts of the mean squared entry
    (the released code); ``frobenius``: sum over experts of the squared norm (eq. 7's scale).

    Equation: schema_bank (7): L_orth = sum_s ||V_s V_s^T - I||_F^2
    Proved by: tests/ops/test_low_rank.py::test_orthonormal_rows_cost_nothing_and_scales_agree
    """
    gram_NRR = rows_NRO @ rows_NRO.mT
    eye_RR = torch.eye(gram_NRR.shape[-1], dtype=gram_NRR.dtype, device=gram_NRR.device)
    squared_NRR = (gram_NRR - eye_RR).square()
    if reduction == "mean":
        return squared_NRR.mean()
    if reduction == "sum":
        return squared_NRR.mean(dim=(-2, -1)).sum()
    return squared_NRR.sum()
