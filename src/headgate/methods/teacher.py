"""Distillation from another state of the same model, given by what enters the language-model head."""

from __future__ import annotations

from torch import Tensor

from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import Anatomy
from headgate.models.sharding import head_tensors
from headgate.ops.distillation import distillation_loss
from headgate.ops.head_loss import shifted_rows


def distilled(
    anatomy: Anatomy, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """T^2 KL(teacher || student) through the model's head, mean over labelled tokens.

    ``student`` and ``teacher`` ``[B, T, H]`` are inputs of the head, ``labels`` ``[B, T]`` unshifted.
    """
    weight_VH, bias_V = head_tensors(anatomy)
    student_NH, _, _ = shifted_rows(student, labels, IGNORE_INDEX)
    teacher_NH, _, _ = shifted_rows(teacher, labels, IGNORE_INDEX)
    return distillation_loss(
        student_NH,
        teacher_NH,
        weight_VH,
        bias_V,
        temperature=temperature,
        softcap=anatomy.softcap,
    )
