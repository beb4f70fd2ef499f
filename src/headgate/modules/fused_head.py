"""Chunked head loss: cross-entropy from the head's input without ever holding ``[B * T, V]``.

    loss = sum_n w (lse(l_n) - l_n[y_n]),   l_n = softcap(h_n W^T + b)
    dl/dh = e W,  dl/dW = e^T h,  dl/db = sum_n e_n,   e = softmax(l) - onehot(y)

Rows are taken a chunk at a time, so the peak is one chunk of logits and one of probabilities, which become the
error in place.
Observers see every chunk in the forward: this is how the backward gate sketches the whole error vector for
one pass over memory that is hot anyway.

``gradients="forward"`` computes dl/dh (and dl/dW) in the same pass: two head products per step.
``gradients="recompute"`` repeats the logits in the backward: three, of which a rejected batch pays one.

Shapes: N labelled rows, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headgate.errors import ConfigError
from headgate.ops import head_loss

CHUNK_ELEMENTS_CPU = 1 << 22
CHUNK_ELEMENTS_GPU = 1 << 26


class HeadChunk:
    """What an observer sees of C labelled rows. ``entropy`` must be read before ``error_CV``, which reuses its memory.

    Attributes:
        hidden_CH, label_C, row_C: head input, label and batch row of each labelled token.
        loss_C: its loss. lse_C: logsumexp of its logits. weight_VH: the head.
    """

    def __init__(
        self,
        hidden_CH: Tensor,
        label_C: Tensor,
        row_C: Tensor,
        l_CV: Tensor,
        weight_VH: Tensor | None,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self.hidden_CH, self.label_C, self.row_C, self.weight_VH = hidden_CH, label_C, row_C, weight_VH
        self.softcap, self.label_smoothing = softcap, label_smoothing
        self._p_CV, self.loss_C, self.lse_C = head_loss.softmax_and_loss(l_CV, label_C, label_smoothing)
        self._l_CV: Tensor | None = l_CV
        self._is_error = False
        self._g_CH: Tensor | None = None

    def entropy(self) -> Tensor:
        """``[C]`` entropy of the prediction, in nats."""
        assert self._l_CV is not None, "entropy is read before error_CV: they share memory"
        return head_loss.entropy(self._l_CV, self._p_CV, self.lse_C)

    @property
    def error_CV(self) -> Tensor:
        """``[C, V]`` fp32 derivative of each row's loss by its (uncapped) logits. Leave it as you found it."""
        if not self._is_error:
            assert self._l_CV is not None
            e_CV = head_loss.error_in_place(self._p_CV, self.label_C, self.label_smoothing)
            if self.softcap is not None:
                e_CV.mul_(head_loss.softcap_slope(self._l_CV, self.softcap))
            self._is_error, self._l_CV = True, None
        return self._p_CV

    def backprop(self) -> Tensor:
        """``[C, H]`` what the head sends back: ``g = e W``, in the weights' dtype.

        Equation: backward_gate (step 1): g_t = W^T e_t, with signal backprop
        Proved by: tests/backward_gate/test_drop_in.py::test_backprop_signal_needs_the_head_and_uses_it
        """
        if self._g_CH is None:
            assert self.weight_VH is not None, "signal: backprop needs the head's weight"
            self._g_CH = self.error_CV.to(self.weight_VH.dtype) @ self.weight_VH
        return self._g_CH


HeadObserver = Callable[[HeadChunk], "Tensor | None"]


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows per chunk: 16 MiB of fp32 logits on a CPU, 256 MiB on a GPU, at least 16 rows."""
    elements = CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_GPU
    return max(16, elements // vocabulary)


def chunked_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    num_items: Tensor | int | None = None,
    shift: bool = True,
    observers: Sequence[HeadObserver] = (),
    gradients: Literal["forward", "recompute"] = "forward",
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Next-token cross-entropy, fp32 scalar.

    Args:
        hidden: ``[B, T, H]`` (or ``[N, H]`` with ``shift=False``) input of the head.
        weight: ``[V, H]``; bias: ``[V]``. Gradients reach them where they require grad (untied heads).
        labels: ``[B, T]`` (or ``[N]``), ``ignore_index`` where nothing is learned.
        reduction: ``mean`` over labelled tokens (0 where there is none) or ``sum``.
        num_items: divides the sum instead (tokens of an accumulation window).
        observers: called with every HeadChunk, outside autograd. One may return ``[C]`` token weights: they
            multiply the gradients, never the reported loss.
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing} is outside [0, 1)")
    if shift:
        h_NH, label_N, row_N = head_loss.shifted_rows(hidden, labels, ignore_index)
    else:
        (keep,) = (labels != ignore_index).nonzero(as_tuple=True)
        h_NH, label_N, row_N = hidden[keep], labels[keep], keep
    dtype = _compute_dtype(weight)
    h_NH = h_NH.to(dtype)
    if num_items is not None:
        scale = 1.0 / torch.as_tensor(num_items, device=hidden.device, dtype=torch.float32)
    else:
        count = 1.0 if reduction == "sum" else float(max(1, label_N.numel()))
        scale = torch.tensor(1.0 / count, device=hidden.device)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (h_NH, weight, bias)
    )
    plan = _Plan(
        softcap=softcap,
        label_smoothing=label_smoothing,
        observers=tuple(observers),
        mode=gradients if differentiable else "none",
        rows=rows_per_chunk or chunk_rows(weight.shape[0], hidden.device),
        row_N=row_N,
    )
    loss: Tensor = _HeadLoss.apply(h_NH, weight.to(dtype), bias, label_N, scale, plan)
    return loss


@dataclass(frozen=True)
class _Plan:
    softcap: float | None
    label_smoothing: float
    observers: tuple[HeadObserver, ...]
    mode: str
    rows: int
    row_N: Tensor

    def chunk(
        self, h_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, label_C: Tensor, row_C: Tensor
    ) -> HeadChunk:
        l_CV = head_loss.head_logits(h_CH, weight_VH, bias_V, self.softcap)
        return HeadChunk(h_CH, label_C, row_C, l_CV, weight_VH, self.softcap, self.label_smoothing)


class _Gradients:
    """dl/dh, dl/dW and dl/db of unit upstream, summed chunk by chunk (the two last in fp32)."""

    def __init__(self, h_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needs: Sequence[bool]) -> None:
        self.dh_NH = torch.zeros_like(h_NH) if needs[0] else None
        self.dW_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs[1] else None
        self.db_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs[2] and bias_V is not None else None

    def add(self, chunk: HeadChunk, where: Any, scale: Tensor, weight_C: Tensor | None) -> None:
        factor_C1 = scale * (torch.ones_like(chunk.loss_C) if weight_C is None else weight_C)[:, None]
        if self.dh_NH is not None:
            self.dh_NH[where] = (chunk.backprop().float() * factor_C1).to(self.dh_NH.dtype)
        if self.dW_VH is not None:
            h_CH = chunk.hidden_CH.float() * factor_C1
            if chunk.hidden_CH.dtype == torch.float32:
                self.dW_VH.addmm_(chunk.error_CV.T, h_CH)
            else:
                dtype = chunk.hidden_CH.dtype
                self.dW_VH += (chunk.error_CV.to(dtype).T @ h_CH.to(dtype)).float()
        if self.db_V is not None:
            self.db_V += chunk.error_CV.T @ factor_C1[:, 0]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_NH: Any, weight_VH: Any, bias_V: Any, label_N: Any, scale: Any, plan: Any) -> Any:
        total = torch.zeros((), device=h_NH.device, dtype=torch.float32)
        sums = _Gradients(h_NH, weight_VH, bias_V, ctx.needs_input_grad) if plan.mode == "forward" else None
        weights: list[Tensor | None] = []
        for start in range(0, h_NH.shape[0], plan.rows):
            where = slice(start, start + plan.rows)
            chunk = plan.chunk(h_NH[where], weight_VH, bias_V, label_N[where], plan.row_N[where])
            total += chunk.loss_C.sum()
            weight_C: Tensor | None = None
            for observer in plan.observers:
                answer = observer(chunk)
                if answer is not None:
                    weight_C = answer if weight_C is None else weight_C * answer
            weights.append(weight_C)
            if sums is not None:
                sums.add(chunk, where, scale, weight_C)
        ctx.plan, ctx.sums, ctx.scale, ctx.weights = plan, sums, scale, weights
        if plan.mode == "recompute":
            ctx.save_for_backward(h_NH, weight_VH, bias_V, label_N)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Any) -> Any:
        sums, plan = ctx.sums, ctx.plan
        if sums is None:
            h_NH, weight_VH, bias_V, label_N = ctx.saved_tensors
            sums = _Gradients(h_NH, weight_VH, bias_V, ctx.needs_input_grad)
            for number, start in enumerate(range(0, h_NH.shape[0], plan.rows)):
                where: Any = slice(start, start + plan.rows)
                weight_C = ctx.weights[number]
                if weight_C is not None:  # a token of weight 0 costs nothing in the backward
                    kept = weight_C.nonzero(as_tuple=True)[0]
                    where, weight_C = kept + start, weight_C[kept]
                chunk = plan.chunk(h_NH[where], weight_VH, bias_V, label_N[where], plan.row_N[where])
                sums.add(chunk, where, ctx.scale, weight_C)
        dh = None if sums.dh_NH is None else (sums.dh_NH * upstream.to(sums.dh_NH.dtype))
        dW = None if sums.dW_VH is None else (sums.dW_VH * upstream)
        db = None if sums.db_V is None else (sums.db_V * upstream)
        return dh, dW, db, None, None, None


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the head's products: autocast's where it is on, else the weights'."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype
