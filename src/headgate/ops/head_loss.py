"""Cross-entropy at the language-model head, for one chunk of rows.

Shapes: C rows of a chunk, H hidden, V vocabulary. All arithmetic is fp32 on logits of any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def head_logits(h_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """``l = h W^T + b`` in the weights' dtype, then fp32; soft-capped as ``c tanh(l / c)`` (Gemma)."""
    l_CV = (h_CH @ weight_VH.T).float()
    if bias_V is not None:
        l_CV += bias_V.float()
    if softcap is not None:
        l_CV.div_(softcap).tanh_().mul_(softcap)
    return l_CV


def row_loss(l_CV: Tensor, label_C: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """``(loss_C, logsumexp_C)`` with ``loss = lse - (1 - s) l[label] - s mean(l)``."""
    lse_C = torch.logsumexp(l_CV, -1)
    gold_C = l_CV.gather(1, label_C[:, None])[:, 0]
    if label_smoothing:
        gold_C = (1 - label_smoothing) * gold_C + label_smoothing * l_CV.mean(-1)
    return lse_C - gold_C, lse_C


def error_in_place(
    l_CV: Tensor, label_C: Tensor, lse_C: Tensor, softcap: float | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Overwrite logits by ``e = dloss/dlogits = softmax(l) - target`` and return them.

    The target is ``(1 - s) onehot + s / V``. With a soft cap, e is the derivative by the logits before the
    cap: times ``1 - (l / c)^2``.
    """
    slope_CV = None if softcap is None else 1 - (l_CV / softcap).square_()
    e_CV = l_CV.sub_(lse_C[:, None]).exp_()
    if label_smoothing:
        e_CV -= label_smoothing / e_CV.shape[1]
    gold_C1 = torch.full_like(lse_C, label_smoothing - 1)[:, None]
    e_CV.scatter_add_(1, label_C[:, None], gold_C1)
    return e_CV if slope_CV is None else e_CV.mul_(slope_CV)


def entropy(l_CV: Tensor, lse_C: Tensor) -> Tensor:
    """Entropy of the prediction per row, in nats: ``lse - sum p l``."""
    return lse_C - (torch.exp(l_CV - lse_C[:, None]) * l_CV).sum(-1)


def shifted_rows(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that have a label: ``(hidden_NH, label_N, row_N)`` with token t paired with label t + 1.

    ``row_N`` is the batch index. Rows without a label cost nothing from here on.
    """
    target = labels[..., 1:]
    index = (target != ignore_index).nonzero(as_tuple=True)
    return hidden[..., :-1, :][index], target[index], index[0]
