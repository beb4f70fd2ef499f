"""HeadEvidence: what one forward says about a micro-batch, gathered chunk by chunk at the head.

The sketch is a TensorSketch of ``sum_t h_t (x) e_t`` (``signal: head``, the head's gradient) or of
``sum_t h_t (x) g_t`` with ``g = W^T e`` (``signal: backprop``, what the layers below really receive).

Shapes: C rows of a chunk, M sketch size, F frequencies, G groups (1, or the sequences of the batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headgate.modules.fused_head import HeadChunk, chunk_rows
from headgate.ops import sketch

Signal = Literal["head", "backprop"]
ErrorVector = Literal["full", "topk"]


@dataclass
class Evidence:
    """One micro-batch (scalars and ``[M]``) or its G sequences (``[G]`` and ``[G, M]``), as plain sums over tokens.

    Attributes:
        sketch: the raw TensorSketch, not normalised. tokens: labelled tokens. loss, entropy: sums over them.
        error_square: sum of ``||e_t||^2``.
    """

    sketch: Tensor
    tokens: Tensor
    loss: Tensor
    entropy: Tensor
    error_square: Tensor

    def packed(self) -> Tensor:
        """Everything in one fp32 vector: what ranks sum in a single small collective."""
        scalars = [self.tokens, self.loss, self.entropy, self.error_square]
        return torch.cat([self.sketch.float(), torch.stack([s.float() for s in scalars])])

    @classmethod
    def unpacked(cls, vector: Tensor) -> Evidence:
        return cls(vector[:-4], *vector[-4:].unbind())


class HeadSketcher(nn.Module):
    """Hash tables as buffers, and accumulators that live for one micro-batch.

    Args:
        hidden_size, vocab_size: sizes of h and e. sketch_size: M.
        signal, error: see the module. error_top_k: probabilities kept by ``error="topk"``, the gold token
            always among them and counted once.
        seed: of the hash tables.
    """

    h_bucket: Tensor
    h_sign: Tensor
    e_bucket: Tensor
    e_sign: Tensor
    h_folded: Tensor
    e_folded: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        sketch_size: int,
        *,
        signal: Signal = "head",
        error: ErrorVector = "full",
        error_top_k: int = 64,
        seed: int = 0,
        wants_sketch: bool = True,
        wants_entropy: bool = False,
        wants_error: bool = False,
    ) -> None:
        super().__init__()
        self.sketch_size, self.signal, self.error, self.error_top_k = sketch_size, signal, error, error_top_k
        self.wants_sketch, self.wants_entropy, self.wants_error = wants_sketch, wants_entropy, wants_error
        other = vocab_size if signal == "head" else hidden_size
        for name, size in (("h", hidden_size), ("e", other)):
            bucket, sign = sketch.hash_tables(size, sketch_size, seed, f"backward_gate/{name}")
            self.register_buffer(f"{name}_bucket", bucket)
            self.register_buffer(f"{name}_sign", sign)
            folded = sketch.signed_buckets(bucket, sign, sketch_size)
            self.register_buffer(f"{name}_folded", folded, persistent=False)
        self.groups = 1
        self.begin()

    def begin(self, groups: int = 1) -> None:
        """Forget the last micro-batch; ``groups`` is the batch size where sequences are scored one by one."""
        self.groups = groups
        device = self.h_bucket.device
        self._spectrum_GF = torch.zeros(
            groups, self.sketch_size // 2 + 1, dtype=torch.complex64, device=device
        )
        self._sums_4G = torch.zeros(4, groups, device=device)

    @torch.no_grad()
    def observe(self, chunk: HeadChunk) -> None:
        """Add a chunk. An observer for ``chunked_head_loss``."""
        parts = [torch.ones_like(chunk.loss_C), chunk.loss_C, torch.zeros_like(chunk.loss_C)]
        parts.append(parts[-1])
        if self.wants_entropy:
            parts[2] = chunk.entropy()
        if self.wants_error:
            parts[3] = torch.linalg.vector_norm(chunk.error_CV, dim=-1).square()
        rows_4C = torch.stack(parts)
        if self.groups == 1:
            self._sums_4G[:, 0] += rows_4C.sum(1)
        else:
            self._sums_4G.index_add_(1, chunk.row_C, rows_4C)
        if self.wants_sketch:
            h_CM = sketch.folded_count_sketch(chunk.hidden_CH, self.h_folded, self.sketch_size)
            e_CM = self._sketch_error(chunk)
            if self.groups == 1:
                self._spectrum_GF[0] += sketch.outer_spectrum(h_CM, e_CM)
            else:
                self._spectrum_GF += sketch.grouped_outer_spectrum(h_CM, e_CM, chunk.row_C, self.groups)

    def _sketch_error(self, chunk: HeadChunk) -> Tensor:
        if self.signal == "backprop":
            return sketch.folded_count_sketch(chunk.backprop(), self.e_folded, self.sketch_size)
        e_CV = chunk.error_CV
        if self.error == "full":
            return sketch.folded_count_sketch(e_CV, self.e_folded, self.sketch_size)
        value_CK, index_CK = top_errors(e_CV, chunk.label_C, self.error_top_k)
        return sketch.sparse_count_sketch(value_CK, index_CK, self.e_bucket, self.e_sign, self.sketch_size)

    def end(self) -> Evidence:
        """The evidence gathered since ``begin``."""
        z_GM = sketch.from_spectrum(self._spectrum_GF, self.sketch_size)
        parts = [z_GM, *self._sums_4G.unbind()]
        return Evidence(*(part[0] for part in parts)) if self.groups == 1 else Evidence(*parts)

    @torch.no_grad()
    def observe_logits(
        self,
        hidden: Tensor,
        logits: Tensor,
        labels: Tensor,
        *,
        weight_VH: Tensor | None = None,
        softcap: float | None = None,
        ignore_index: int = -100,
    ) -> None:
        """The same from ready-made ``[B, T, V]`` logits (soft cap already applied), a chunk at a time."""
        target = labels[..., 1:]
        b_N, t_N = (target != ignore_index).nonzero(as_tuple=True)
        step = chunk_rows(logits.shape[-1], logits.device)
        for start in range(0, b_N.numel(), step):
            b_C, t_C = b_N[start : start + step], t_N[start : start + step]
            l_CV = logits[b_C, t_C].float()
            self.observe(HeadChunk(hidden[b_C, t_C], target[b_C, t_C], b_C, l_CV, weight_VH, softcap))


def top_errors(e_CV: Tensor, label_C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``(value, index)``, each ``[C, min(K, V-1) + 1]``: the gold error once, then the K largest others.

    Values are those of the full softmax: nothing is renormalised over what is kept.
    """
    gold_C1 = e_CV.gather(1, label_C[:, None])
    others_CV = e_CV.scatter(1, label_C[:, None], float("-inf"))
    value_CK, index_CK = others_CV.topk(min(k, e_CV.shape[1] - 1), dim=1)
    return torch.cat([gold_C1, value_CK], 1), torch.cat([label_C[:, None], index_CK], 1)
