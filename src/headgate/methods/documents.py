"""Documents of a batch: taken out, known again, put together anew, or kept out of training.

Legend: N documents, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import Batch


def documents_of(batch: Mapping[str, Tensor]) -> Tensor:
    """``[B, T]`` document number within its row, negative on padding."""
    if batch.get("segment_ids") is not None:
        return torch.as_tensor(batch["segment_ids"])
    mask = batch.get("attention_mask")
    return torch.zeros_like(batch["input_ids"]) if mask is None else torch.as_tensor(mask).long() - 1


def _places(batch: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Row and ``[T]`` mask of every document, rows in order, on the CPU."""
    for row, of in enumerate(documents_of(batch).cpu()):
        for number in of[of >= 0].unique().tolist():
            yield row, of == number


def documents_in(batch: Batch) -> Tensor:
    """``[N, T, 2]`` on the CPU: token id and label of every document of a batch, rows in order, padded with -100."""
    pairs = torch.stack([batch["input_ids"], batch["labels"]], -1).cpu()
    rows = [pairs[row][of] for row, of in _places(batch)]
    return pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)


def document_lengths(documents_NT2: Tensor) -> Tensor:
    """``[N]``: tokens of each document, without its padding."""
    return (documents_NT2[..., 0] != IGNORE_INDEX).sum(-1)


def document_ids(documents_NT2: Tensor) -> Tensor:
    """``[N]``: a 64-bit polynomial hash of each document's tokens, so that the same text is known again."""
    tokens = documents_NT2[..., 0]
    powers = torch.full((tokens.shape[1],), 6364136223846793005).cumprod(0)  # Knuth's multiplier, modulo 2^64
    return ((tokens + 1) * (tokens >= 0) * powers).sum(-1)


def as_batch(documents_NT2: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Documents as a right-padded batch, one a row."""
    kept = documents_NT2[:, : int(document_lengths(documents_NT2).max())]
    ids, labels = kept.unbind(-1)
    mask = ids != IGNORE_INDEX
    batch = {"input_ids": torch.where(mask, ids, 0), "labels": labels, "attention_mask": mask.long()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def labels_without(batch: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    """``[B, T]``: the labels with those of the documents of these ids taken out; None where the batch has none of them."""
    there = torch.isin(document_ids(documents_in(batch)), ids).tolist()
    if not any(there):
        return None
    labels = torch.as_tensor(batch["labels"]).clone()
    for (row, of), out in zip(_places(batch), there, strict=True):
        if out:
            labels[row, of.to(labels.device)] = IGNORE_INDEX
    return labels
