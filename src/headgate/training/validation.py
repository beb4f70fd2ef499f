"""Validation loss and accuracy of the next token, weighted by tokens, so that they do not depend on the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.models.anatomy import Batch

if TYPE_CHECKING:
    import datasets

Forward = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
"""(batch, its trained tokens) -> (loss summed over tokens and divided by their number, logits ``[B, T, V]``)."""


def validation_order(dataset: datasets.Dataset, length_column: str = "length") -> list[int]:
    """Rows by length where it is known, so that batches hold little padding; the same in every process and run.

    transformers' own order under ``group_by_length`` follows the run's seed: which rows share a batch, and with it the last
    digits of a validation loss, would differ between the seeds of a comparison and could not be repeated without it.
    """
    if length_column in getattr(dataset, "column_names", ()):
        lengths = list(dataset[length_column])
        return sorted(range(len(lengths)), key=lambda i: lengths[i])
    return list(range(len(dataset)))


@torch.no_grad()
def validation_terms(forward: Forward, batches: Iterable[Batch]) -> Iterator[tuple[list[float], int]]:
    """Of every batch: summed loss in nats, trained tokens, hits of the most likely token; and its rows."""
    for batch in batches:
        labels = batch["labels"]
        tokens = labels[..., 1:].ne(-100).sum()
        loss, logits = forward(batch, tokens.clamp(min=1))
        hits = (logits[..., :-1, :].argmax(-1) == labels[..., 1:]).sum()
        count = float(tokens)
        yield [float(loss) * count, count, float(hits)], labels.shape[0]


def added(terms: Iterable[tuple[list[float], int]]) -> tuple[Tensor, int]:
    """``[3]`` fp64 and the number of rows; terms of several ranks come in the order in which one process reads."""
    sums, rows = torch.zeros(3, dtype=torch.float64), 0
    for term, count in terms:
        sums += torch.tensor(term, dtype=torch.float64)
        rows += count
    return sums, rows


def validation_sums(forward: Forward, batches: Iterable[Mapping[str, object]]) -> tuple[Tensor, int]:
    """The sums of ``validation_terms`` over all batches, in one process."""
    return added(validation_terms(forward, batches))


def validation_metrics(sums: Tensor, prefix: str) -> dict[str, float]:
    """``<prefix>_loss``, ``_accuracy`` and ``_tokens`` from the sums over all batches and ranks."""
    loss, tokens, hits = sums.tolist()
    return {
        f"{prefix}_loss": loss / max(tokens, 1),
        f"{prefix}_accuracy": hits / max(tokens, 1),
        f"{prefix}_tokens": tokens,
    }
