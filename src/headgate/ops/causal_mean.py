"""Running sums and means that never see the future, another document, or padding.

Legend: B batch, T tokens, H features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_sum(
    x_BTH: Tensor,
    counted_BT: Tensor,
    document_BT: Tensor,
    past: tuple[Tensor, Tensor] | None = None,
    packed: bool = True,
) -> tuple[Tensor, Tensor]:
    """``[B, T, H]`` sum of the counted x_s, s <= t, in the document of t, and ``[B, T]`` their number; fp32.

    ``document_BT`` numbers the documents of a row, which lie one after another. ``past`` is the sum
    ``[B, H]`` and the number ``[B]`` at the end of an earlier call on the same rows: it continues the first document.
    ``packed`` False says that every row is one document, which spares the work for several. What is not counted adds
    exactly zero.
    """
    x_BTH = torch.where(counted_BT.unsqueeze(-1), x_BTH.float(), 0)
    total_BTH, number_BT = x_BTH.cumsum(1), counted_BT.float().cumsum(1)
    first_BT = torch.ones_like(document_BT, dtype=torch.bool)
    if packed:  # told, not read off: to look whether a document begins would be to wait for the device
        place_T = torch.arange(document_BT.shape[1], device=document_BT.device)
        begins_BT = torch.zeros_like(first_BT)
        begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
        start_BT = torch.where(begins_BT, place_T, 0).cummax(1).values
        before_BTH, before_BT = total_BTH - x_BTH, number_BT - counted_BT.float()
        index_BTH = start_BT.unsqueeze(-1).expand_as(x_BTH)
        total_BTH = total_BTH - before_BTH.gather(1, index_BTH)
        number_BT = number_BT - before_BT.gather(1, start_BT)
        first_BT = start_BT == 0
    if past is not None:
        total_BTH = total_BTH + past[0].unsqueeze(1) * first_BT.unsqueeze(-1)
        number_BT = number_BT + past[1].unsqueeze(1) * first_BT
    return total_BTH, number_BT


def causal_mean(
    x_BTH: Tensor,
    counted_BT: Tensor,
    document_BT: Tensor,
    past: tuple[Tensor, Tensor] | None = None,
    packed: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``causal_sum`` over its number, zero before the first; and what continues it, the sum ``[B, H]`` and the number ``[B]``."""
    total_BTH, number_BT = causal_sum(x_BTH, counted_BT, document_BT, past, packed)
    return total_BTH / number_BT.clamp(min=1).unsqueeze(-1), (total_BTH[:, -1], number_BT[:, -1])
