"""Distillation at the language-model head, chunk by chunk: two [N, V] logit tables are never whole in memory.

By what is said (``distillation_loss``) or by the logits themselves (``logit_matching_loss``).

Shapes: N labelled tokens, H hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headgate.ops.head_loss import head_logits

CHUNK_ELEMENTS = 1 << 22
"""Logits of one chunk: rows times vocabulary."""


def distillation_loss(
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    *,
    temperature: float = 2.0,
    softcap: float | None = None,
) -> Tensor:
    """mean_n T^2 KL(softmax(teacher / T) || softmax(student / T)), fp32 (Hinton et al. 2015, section 2).

    Both are given by the head's input; chunks of rows are recomputed in the backward.

    Equation: layer_routing (KD): L = mean T^2 KL(softmax(teacher / T) || softmax(student / T))
    Equation: lora_experts (KD): lambda T^2 KL(p_mature || p_young)
    Proved by: tests/layer_routing/test_laws.py::test_distillation_is_the_plain_formula
    """

    def of_chunk(student_CH: Tensor, teacher_CH: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_CV = torch.log_softmax(
                head_logits(teacher_CH, weight_VH, bias_V, softcap) / temperature, -1
            )
        student_CV = torch.log_softmax(_capped(student_CH, weight_VH, bias_V, softcap) / temperature, -1)
        return (teacher_CV.exp() * (teacher_CV - student_CV)).sum()

    total = _sum_over_chunks(of_chunk, student_NH, teacher_NH, weight_VH.shape[0])
    return temperature**2 * total / max(len(student_NH), 1)


def logit_matching_loss(
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    *,
    softcap: float | None = None,
) -> Tensor:
    """mean_n mean_v (z_student - z_teacher)^2 between logits, fp32 (Buzzega et al. 2020, equation 5).

    Both are given by the head's input, as above.
    """

    def of_chunk(student_CH: Tensor, teacher_CH: Tensor) -> Tensor:
        if softcap is None:  # the head is affine: its bias falls out
            return ((student_CH - teacher_CH) @ weight_VH.T).float().square().mean(-1).sum()
        with torch.no_grad():
            teacher_CV = head_logits(teacher_CH, weight_VH, bias_V, softcap)
        return (_capped(student_CH, weight_VH, bias_V, softcap) - teacher_CV).square().mean(-1).sum()

    return _sum_over_chunks(of_chunk, student_NH, teacher_NH, weight_VH.shape[0]) / max(len(student_NH), 1)


def _capped(h_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """``head_logits`` without its writes in place, which a graph does not survive."""
    logits_CV = (h_CH @ weight_VH.T).float()
    if bias_V is not None:
        logits_CV = logits_CV + bias_V.float()
    return logits_CV if softcap is None else softcap * torch.tanh(logits_CV / softcap)


def _sum_over_chunks(
    of_chunk: Callable[[Tensor, Tensor], Tensor], student_NH: Tensor, teacher_NH: Tensor, vocabulary: int
) -> Tensor:
    """Chunks of rows, computed again in the backward."""
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    total = student_NH.new_zeros((), dtype=torch.float32)
    for student_CH, teacher_CH in zip(student_NH.split(rows), teacher_NH.split(rows), strict=True):
        total = total + checkpoint(of_chunk, student_CH, teacher_CH, use_reentrant=False)
    return total
