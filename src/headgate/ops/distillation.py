"""Distillation at the language-model head, chunk by chunk: two [N, V] logit tables are never whole in memory.

Shapes: N labelled tokens, H hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

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
        logits_CV = (student_CH @ weight_VH.T).float()
        if bias_V is not None:
            logits_CV = logits_CV + bias_V.float()
        if softcap is not None:
            logits_CV = softcap * torch.tanh(logits_CV / softcap)
        student_CV = torch.log_softmax(logits_CV / temperature, -1)
        return (teacher_CV.exp() * (teacher_CV - student_CV)).sum()

    rows = max(1, CHUNK_ELEMENTS // weight_VH.shape[0])
    total = student_NH.new_zeros((), dtype=torch.float32)
    for student_CH, teacher_CH in zip(student_NH.split(rows), teacher_NH.split(rows), strict=True):
        total = total + checkpoint(of_chunk, student_CH, teacher_CH, use_reentrant=False)
    return temperature**2 * total / max(len(student_NH), 1)
