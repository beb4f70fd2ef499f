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


def softmax_and_loss(
    l_CV: Tensor, label_C: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``(p_CV, loss_C, logsumexp_C)`` with ``loss = lse - (1 - s) l[label] - s mean(l)``.

    One exponential per logit serves all three: ``lse = max l - log max p``, and max p is at least 1/V.
    """
    p_CV = torch.softmax(l_CV, -1)
    lse_C = l_CV.amax(-1) - p_CV.amax(-1).log()
    gold_C = l_CV.gather(1, label_C[:, None])[:, 0]
    if label_smoothing:
        gold_C = (1 - label_smoothing) * gold_C + label_smoothing * l_CV.mean(-1)
    return p_CV, lse_C - gold_C, lse_C


def error_in_place(p_CV: Tensor, label_C: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Overwrite probabilities by ``e = dloss/dlogits = p - ((1 - s) onehot + s / V)`` and return them.

    Equation: backward_gate (step 1): e_t = softmax(l_t) - onehot(y_t)
    Proved by: tests/backward_gate/test_head_loss.py::test_observers_see_the_exact_error_and_change_nothing
    """
    if label_smoothing:
        p_CV -= label_smoothing / p_CV.shape[1]
    gold_C1 = p_CV.new_full((p_CV.shape[0], 1), label_smoothing - 1)
    return p_CV.scatter_add_(1, label_C[:, None], gold_C1)


def softcap_slope(l_CV: Tensor, softcap: float) -> Tensor:
    """``1 - (l / c)^2``: derivative of the capped logit by the logit before the cap. Overwrites l."""
    return l_CV.div_(softcap).square_().neg_().add_(1)


def entropy(l_CV: Tensor, p_CV: Tensor, lse_C: Tensor) -> Tensor:
    """Entropy of the prediction per row, in nats: ``lse - sum p l``."""
    return lse_C - torch.linalg.vecdot(p_CV, l_CV)


def shifted_rows(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that have a label: ``(hidden_NH, label_N, row_N)`` with token t paired with label t + 1.

    ``row_N`` is the batch index. Rows without a label cost nothing from here on.
    """
    target = labels[..., 1:]
    index = (target != ignore_index).nonzero(as_tuple=True)
    return hidden[..., :-1, :][index], target[index], index[0]
