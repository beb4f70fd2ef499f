"""Comparing and merging low-rank updates without ever forming them.

    <dW_i, dW_j> = sum((A_i A_j^T) * (B_i^T B_j))        r_i x r_j products, not O x I ones
    merge: sum_i w_i dW_i = [w_i B_i][A_i]; QR of both sides, SVD of the small core, the r largest values kept

Legend: I inputs, O outputs, r rank, R summed rank. ``up`` holds rows, so dW = up^T down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""``down`` [r, I] and ``up`` [r, O] of one expert at one site, its scale included in ``up``."""


def inner_product(a: Factors, b: Factors) -> Tensor:
    """<dW_a, dW_b>, the sum over all entries, through r_a x r_b products.

    Equation: lora_experts (likeness): <dW_i, dW_j> = sum((A_i A_j^T) * (B_i^T B_j))
    Proved by: tests/lora_experts/test_merging.py::test_cosines_and_merges_are_those_of_the_whole_matrices
    """
    return ((a[0] @ b[0].T) * (a[1] @ b[1].T)).sum()


def cosines(experts: Sequence[Sequence[Factors]]) -> Tensor:
    """``[N, N]`` cos(dW_i, dW_j) of experts given by their factors at the same sites, all sites as one vector.

    An expert that changes nothing has cosine 0 with every other and 1 with itself.
    """
    count = len(experts)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for of_site in zip(*experts, strict=True):
        down_RI, up_RO = (torch.cat([factors[side] for factors in of_site]) for side in (0, 1))
        ranks = torch.tensor([len(down) for down, _ in of_site])
        owner_R = torch.arange(count).repeat_interleave(ranks)
        for i, (down, up) in enumerate(
            of_site
        ):  # one expert against all: two products, whatever their number
            shares_R = ((down @ down_RI.T) * (up @ up_RO.T)).sum(0)
            gram[i].index_add_(0, owner_R, shares_R.double().cpu())
    gram = (gram + gram.T) / 2
    norm = gram.diagonal().clamp(min=0).sqrt()
    cosine_NN = gram / torch.outer(norm, norm).clamp(min=torch.finfo(torch.float64).tiny)
    return cosine_NN.clamp(-1, 1).fill_diagonal_(1.0)


def merged(members: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
    """The best rank-``rank`` approximation of sum_i w_i dW_i (Eckart-Young), by QR and a small SVD.

    Exact where the sum has that rank or less, as for identical experts. ``rank`` rows, padded with zeros.

    Equation: lora_experts (merge): the best rank-r approximation of sum_i w_i dW_i
    Proved by: tests/lora_experts/test_merging.py::test_cosines_and_merges_are_those_of_the_whole_matrices
    Proved by: tests/lora_experts/test_merging.py::test_identical_experts_merge_exactly_and_strangers_stay_apart
    """
    down_RI = torch.cat([down for down, _ in members]).double()
    up_RO = torch.cat([w * up for w, (_, up) in zip(weights, members, strict=True)]).double()
    q_in, r_in = torch.linalg.qr(down_RI.T)
    q_out, r_out = torch.linalg.qr(up_RO.T)
    u, s, v = torch.linalg.svd(r_out @ r_in.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    down = torch.zeros(rank, down_RI.shape[1], dtype=torch.float64, device=down_RI.device)
    up = torch.zeros(rank, up_RO.shape[1], dtype=torch.float64, device=up_RO.device)
    down[:kept] = root[:, None] * (v[:kept] @ q_in.T)
    up[:kept] = root[:, None] * (q_out @ u[:, :kept]).T
    dtype = members[0][0].dtype
    return down.to(dtype), up.to(dtype)
