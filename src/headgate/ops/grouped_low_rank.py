"""N low-rank experts where each is given only the tokens that chose it: for training and prompts on a CPU.

    y_t = sum over the experts e that t chose of  w_te (x_t A_e^T) B_e

Tokens are put in the order of their experts once, so that an expert costs four small products (two forward, two backward)
whatever it is. The rank-space products, r numbers a choice, are kept for the backward: an expert that does not train
needs no input there, and its factors never enter the autograd graph. An expert that every token chose, as a young one is,
reads the tokens where they lie.

Reads the choice on the host. Cost: [M K, I + O] scratch in each direction.

Legend: M tokens, K chosen experts of a token, P = M K pairs (token, choice), I inputs, O outputs, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

Factors = tuple[Tensor, Tensor]
"""``down`` [r, I] and ``up`` [r, O]."""


class Group(NamedTuple):
    """Of one expert with tokens: its place, and its pairs as a slice of the sorted ones. ``whole``: all tokens, in order."""

    place: int
    start: int
    stop: int
    whole: bool


class Grouping(NamedTuple):
    """Pairs in the order of their experts, token order kept: ``pairs_P`` and ``tokens_P`` by sorted place; ``sorted_MK``
    is where each pair went."""

    pairs_P: Tensor
    tokens_P: Tensor
    sorted_MK: Tensor
    groups: tuple[Group, ...]


def group_by_expert(chosen_MK: Tensor, count: int) -> Grouping:
    """Who serves which tokens; a token names an expert at most once. Reads the choice on the host."""
    flat_P, (tokens, k) = chosen_MK.reshape(-1), chosen_MK.shape
    pairs_P = flat_P.argsort(stable=True)
    sorted_P = torch.empty_like(pairs_P)
    sorted_P[pairs_P] = torch.arange(len(pairs_P), device=pairs_P.device)
    bounds = [0, *torch.bincount(flat_P, minlength=count).cumsum(0).tolist()]
    groups = tuple(
        Group(place, start, stop, stop - start == tokens)
        for place, (start, stop) in enumerate(itertools.pairwise(bounds))
        if stop > start
    )
    return Grouping(pairs_P, pairs_P.div(k, rounding_mode="floor"), sorted_P.view(tokens, k), groups)


class _Grouped(torch.autograd.Function):
    """``used`` holds the factors of every group; ``live`` which groups train, whose factors are the arguments that follow."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        weight_MK: Tensor,
        grouping: Grouping,
        used: Sequence[Factors],
        live: Sequence[int],
        *factors: Tensor,
    ) -> Tensor:
        x_PI = _of_pairs(x_MI, grouping)
        weight_P1 = weight_MK.reshape(-1).index_select(0, grouping.pairs_P)[:, None]
        inner_Pr = _rank_space(x_MI, x_PI, [down for down, _ in used], grouping)
        y_MO = _back(inner_Pr * weight_P1, [up for _, up in used], grouping)
        ctx.save_for_backward(inner_Pr, weight_P1, x_MI if live else None, *factors)
        ctx.grouping, ctx.live = grouping, tuple(live)
        # a frozen expert's factors are no part of the graph; a live one's come back through the graph, version checked
        ctx.used = [None if at in ctx.live else pair for at, pair in enumerate(used)]
        return y_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        inner_Pr, weight_P1, x_MI, *factors = ctx.saved_tensors
        grouping, live, used = ctx.grouping, ctx.live, list(ctx.used)
        for number, at in enumerate(live):
            used[at] = factors[2 * number], factors[2 * number + 1]
        want_x, want_weight, _, _, _, *want = ctx.needs_input_grad
        grad_PO = _of_pairs(grad_MO, grouping)
        through_Pr = _rank_space(grad_MO, grad_PO, [up for _, up in used], grouping)
        grad_weight = None
        if want_weight:
            grad_weight = torch.empty_like(weight_P1[:, 0])
            grad_weight[grouping.pairs_P] = (inner_Pr * through_Pr).sum(-1)
            grad_weight = grad_weight.view_as(grouping.sorted_MK)
        through_Pr *= weight_P1
        grads: list[Tensor | None] = []
        for number, at in enumerate(live):
            group, rank = grouping.groups[at], len(used[at][0])
            rows = slice(group.start, group.stop)
            down = up = None
            if want[2 * number]:
                x = x_MI if group.whole else x_MI.index_select(0, grouping.tokens_P[rows])
                down = through_Pr[rows, :rank].T @ x
            if want[2 * number + 1]:
                grad = grad_MO if group.whole else grad_PO[rows]
                up = (inner_Pr[rows, :rank] * weight_P1[rows]).T @ grad
            grads += [down, up]
        grad_x = _back(through_Pr, [down for down, _ in used], grouping) if want_x else None
        return grad_x, grad_weight, None, None, None, *grads


def _of_pairs(rows_Mx: Tensor, grouping: Grouping) -> Tensor:
    """The pairs' rows in sorted order, up to where only whole groups follow (the young stand last): they read no copy."""
    stop = max((group.stop for group in grouping.groups if not group.whole), default=0)
    return rows_Mx.index_select(0, grouping.tokens_P[:stop])


def _rank_space(rows_Mx: Tensor, rows_Px: Tensor, sides: Sequence[Tensor], grouping: Grouping) -> Tensor:
    """``[P, r]``: each pair's row times one side of its expert; zeros beyond the expert's rank."""
    ranks = [len(side) for side in sides]
    make = rows_Mx.new_empty if len(set(ranks)) == 1 else rows_Mx.new_zeros
    inner_Pr = make(len(grouping.pairs_P), max(ranks))
    # one split: a slice per expert would cost as much as its product
    sizes = [stop - start for _, start, stop, _ in grouping.groups]
    covered = list(itertools.takewhile(lambda stop: stop <= len(rows_Px), itertools.accumulate(sizes)))
    taken = [*rows_Px.split(sizes[: len(covered)]), *[rows_Mx] * (len(sizes) - len(covered))]
    for group, side, rank, out, rows in zip(
        grouping.groups, sides, ranks, inner_Pr.split(sizes), taken, strict=True
    ):
        out = out if rank == inner_Pr.shape[1] else out[:, :rank]
        torch.mm(rows_Mx if group.whole else rows, side.T, out=out)
    return inner_Pr


def _back(inner_Pr: Tensor, sides: Sequence[Tensor], grouping: Grouping) -> Tensor:
    """``[M, x]``: each pair's rank-space row times the other side of its expert, summed over a token's pairs."""
    out_Px = inner_Pr.new_empty(len(inner_Pr), sides[0].shape[1])
    sizes = [stop - start for _, start, stop, _ in grouping.groups]
    for side, inner, out in zip(sides, inner_Pr.split(sizes), out_Px.split(sizes), strict=True):
        torch.mm(inner if len(side) == inner.shape[1] else inner[:, : len(side)], side, out=out)
    # one pass over the pairs, where selecting and adding choice by choice would take three times K
    return embedding_bag(grouping.sorted_MK, out_Px, mode="sum")


def grouped_experts(
    x: Tensor,
    factors: Sequence[Factors],
    weight_BTK: Tensor,
    chosen_BTK: Tensor,
    grouping: Grouping | None = None,
) -> Tensor:
    """The sum over chosen experts for inputs ``[.., I]``; a frozen expert costs no gradient.

    ``factors``: of every expert; only those of chosen ones are read. ``weight_BTK``, ``chosen_BTK``: gates of the chosen
    and who they are, broadcast against the leading dimensions. ``grouping``: of this choice, where it is known already.
    Computes in the type of ``x``, or the autocast type.
    """
    device, k = x.device.type, chosen_BTK.shape[-1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if grouping is None:
        grouping = group_by_expert(chosen_BTK.expand(*x.shape[:-1], k).reshape(-1, k), len(factors))
    used = [factors[group.place] for group in grouping.groups]
    used = [(down.to(dtype), up.to(dtype)) for down, up in used]
    grad = torch.is_grad_enabled()
    live = [at for at, pair in enumerate(used) if grad and any(side.requires_grad for side in pair)]
    trained = [side for at in live for side in used[at]]
    weight_MK = weight_BTK.to(dtype).expand(*x.shape[:-1], k).reshape(-1, k)
    x_MI = x.to(dtype).reshape(-1, x.shape[-1])
    with torch.autocast(device, enabled=False):
        y_MO: Tensor = _Grouped.apply(x_MI, weight_MK, grouping, used, live, *trained)
    return y_MO.view(*x.shape[:-1], -1)


def grouped_is_faster(tokens: int, ranks: Sequence[int], k: int, width: int) -> bool:
    """Whether gathering by expert beats the two dense products, ``width`` = I + O.

    Cost in dense rank columns: a gathered pair costs its rank and about 40 columns of memory traffic, an
    expert about 1.7e6 / width token-columns of call overhead; no more experts run than there are pairs.
    """
    dense = tokens * sum(ranks)
    grouped = tokens * k * (max(ranks) + 40) + min(len(ranks), tokens * k) * 1.7e6 / width
    return grouped < dense
