"""N low-rank experts where only the chosen ones are read: for the few tokens of a decoding step.

Several tokens read a copy of each one's chosen rows. Which rows those are depends on the gates alone, so sites that share
their gates compute it once. A single token on a CPU reads its experts where they lie.

Legend: M tokens, I inputs, O outputs, N experts, K chosen, r the largest rank, P = K r copied rows, R total rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """``place`` ``[M, P]`` into the stacked rows of all experts, and ``weight`` ``[M, P, 1]``: the gate, or 0 for a
    place beyond its expert's rank."""

    place: Tensor
    weight: Tensor


def gathered_is_faster(tokens: int, ranks: Sequence[int], k: int) -> bool:
    """Whether copying each token's chosen rows beats reading every row once.

    Cost in rows of the dense products: a copied row about 4, the indexing about 128. Fits 18 measured shapes
    (1-32 tokens, N 8-64, r 16, width 1,024).
    """
    return 128 + 4 * tokens * k * max(ranks) < sum(ranks)


def chosen_rows(gates_BTN: Tensor, chosen_BTK: Tensor, ranks: Sequence[int], leading: Sequence[int]) -> Rows:
    """The rows of each token's experts, for inputs ``[*leading, I]``. Reads nothing on the host."""
    size_N = torch.tensor(ranks, device=gates_BTN.device)
    start_N, place_r = size_N.cumsum(0) - size_N, torch.arange(max(ranks), device=gates_BTN.device)
    chosen_MK = chosen_BTK.expand(*leading, -1).reshape(-1, chosen_BTK.shape[-1])
    gates_MN = gates_BTN.expand(*leading, len(ranks)).reshape(-1, len(ranks))
    real_MKr = place_r < size_N[chosen_MK].unsqueeze(-1)
    place_MKr = (start_N[chosen_MK].unsqueeze(-1) + place_r) * real_MKr
    weight_MKr = gates_MN.gather(-1, chosen_MK).unsqueeze(-1) * real_MKr
    return Rows(place_MKr.flatten(1), weight_MKr.flatten(1).unsqueeze(-1))


def gathered_low_rank(x: Tensor, down_RI: Tensor, up_RO: Tensor, rows: Rows) -> Tensor:
    """sum over the chosen rows of g (x a^T) b, computed in the type of ``x``."""
    place_MP, flat = rows.place, rows.place.view(-1)
    down_MPI, up_MPO = (
        t.index_select(0, flat).to(x.dtype).view(*place_MP.shape, -1) for t in (down_RI, up_RO)
    )
    inner_MP1 = (down_MPI @ x.reshape(-1, x.shape[-1], 1)) * rows.weight.to(x.dtype)
    return (inner_MP1.mT @ up_MPO).view(*x.shape[:-1], -1)


def one_token_low_rank(x: Tensor, chosen: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """sum_e g_e (x A_e^T) B_e for one token ``[*, I]``; ``chosen`` holds ``[r, I]``, ``[r, O]`` and the gate of each."""
    x_I, total_O = x.reshape(-1), None
    for down_rI, up_rO, gate in chosen:
        inner_r = torch.mv(down_rI.to(x.dtype), x_I) * gate
        up_Or = up_rO.to(x.dtype).mT
        total_O = torch.mv(up_Or, inner_r) if total_O is None else torch.addmv(total_O, up_Or, inner_r)
    assert total_O is not None
    return total_O.view(*x.shape[:-1], -1)
