"""What a choice among masks could gain: by token, by document, and by what a document's first tokens already show.

    single    min_k mean_n l_kn                  one mask for all
    document  sum_d min_k sum_{n in d} l_kn / N
    token     mean_n min_k l_kn
    prefix    k(d) = argmin_k over the first tokens of d; mean over the rest, against the best single one there

``token`` and ``document`` know the losses that they choose by: bounds that no router reaches, since the least of noisy
losses is low whatever the masks are worth. ``prefix`` is a choice that a router could make.

Legend: K masks, N tokens (of all documents), D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.errors import DataError
from headgate.methods.layer_routing.masks import masks_of
from headgate.methods.layer_routing.method import LayerRouting
from headgate.models.aside import look_aside

PREFIX = 16


@dataclass(frozen=True)
class Oracle:
    """Mean losses; ``best`` is the mask of ``single``. ``prefix`` and ``single_after`` count tokens after the prefix."""

    single: float
    best: int
    document: float
    token: float
    single_after: float
    prefix: float
    tokens: int


@dataclass(frozen=True)
class TokenLosses:
    """Of every predicted real token: ``loss`` ``[N]``, ``document`` number and ``place`` in it."""

    loss: Tensor
    document: Tensor
    place: Tensor


def token_losses(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> TokenLosses:
    """Cross-entropy token by token, right-padded batches, a row a document. Raises DataError where there is none."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = 0
    with look_aside(model):
        for batch in batches:
            ids, real = batch["input_ids"], batch["attention_mask"].bool()[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            row, place = real.nonzero(as_tuple=True)
            parts.append((loss[real].cpu(), (row + rows).cpu(), place.cpu()))
            rows += len(ids)
    if not sum(len(loss) for loss, _, _ in parts):
        raise DataError("no token to predict in the batches: nothing to choose by")
    return TokenLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))


def choice(loss_KN: Tensor, document_N: Tensor, place_N: Tensor, prefix: int = PREFIX) -> Oracle:
    """What each kind of choice among K masks would reach. Without a token after any prefix its two means are NaN."""
    count = int(document_N.max()) + 1

    def by_document(loss: Tensor, document: Tensor) -> Tensor:
        return loss.new_zeros(len(loss), count).index_add(1, document, loss)

    mean_K, total = loss_KN.mean(1), loss_KN.shape[1]
    early_N = place_N < prefix
    shown_KD = by_document(loss_KN[:, early_N], document_N[early_N])
    chosen_N = shown_KD.argmin(0)[document_N[~early_N]]
    after_KN = loss_KN[:, ~early_N]
    return Oracle(
        single=float(mean_K.min()),
        best=int(mean_K.argmin()),
        document=float(by_document(loss_KN, document_N).min(0).values.sum() / total),
        token=float(loss_KN.min(0).values.mean()),
        single_after=float(after_KN.mean(1).min()),
        prefix=float(after_KN.gather(0, chosen_N.unsqueeze(0)).mean()),
        tokens=total,
    )


def masked_losses(
    method: LayerRouting, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[Tensor], list[TokenLosses]]:
    """Every mask of the method's depth on its own weights, and the losses under each."""
    closed = method.config.num_skipped(method.num_blocks)
    masks = masks_of(len(method.blocks), closed, method.config.gates_per_block)
    losses = []
    for mask in masks:
        with method.execution.under(mask):
            losses.append(token_losses(model, batches))
    return masks, losses
