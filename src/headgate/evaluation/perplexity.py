"""Perplexity: token-weighted and label-masked, at given context lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from headgate.data.config import DataConfig, LossOn
from headgate.data.long_text import LONG, tokenise_long
from headgate.data.preparation import prepare
from headgate.data.readers.base import RawRow
from headgate.data.spans import encoder
from headgate.errors import ConfigError, DataError
from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import describe
from headgate.models.aside import look_aside

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def sequence_losses(
    model: nn.Module, rows: Sequence[RawRow], pad_id: int, batch_size: int
) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, trained tokens) of every row, in order; fp32 sums."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    with look_aside(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            width = max(len(rows[i]["input_ids"]) for i in indices)
            ids = torch.full((len(indices), width), pad_id)
            labels = torch.full((len(indices), width), IGNORE_INDEX)
            mask = torch.zeros((len(indices), width), dtype=torch.long)
            for row, index in enumerate(indices):
                length = len(rows[index]["input_ids"])
                ids[row, :length] = torch.as_tensor(rows[index]["input_ids"])
                labels[row, :length] = torch.as_tensor(rows[index]["labels"])
                mask[row, :length] = 1
            # a cache that nobody reads costs memory, and a routed block with one to fill sums in another order
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            targets = labels[:, 1:].to(device)
            losses = cross_entropy(
                logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
            ).double()
            for row, index in enumerate(indices):
                results[index] = (float(losses[row].sum()), int(targets[row].ne(IGNORE_INDEX).sum()))
    return results


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    *,
    length: int,
    loss_on: LossOn = "completion",
    batch_size: int = 32,
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Loss per token (nats) and perplexity over rows cut at ``length`` tokens, and each row's share.

    Raises DataError when no row has a trained token at this length.
    """
    context = describe(model).context_length
    config = DataConfig(max_length=length, loss_on=loss_on, group_by_length=False, long_prompts="drop")
    prepared = prepare(rows, tokenizer, config, context_length=context)
    losses = sequence_losses(model, prepared.dataset, tokenizer.pad_token_id, batch_size)
    tokens = sum(count for _, count in losses)
    if tokens == 0:
        raise DataError(f"no row has a trained token within {length} tokens: raise the length")
    loss = math.fsum(value for value, _ in losses) / tokens
    items = [
        {"id": row["example_id"], "loss": value / max(count, 1), "tokens": count}
        for row, (value, count) in zip(prepared.dataset, losses, strict=True)
    ]
    metrics = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "tokens": tokens,
        "rows": len(items),
        "truncated_rows": prepared.report.truncated,
        "dropped_rows": prepared.report.dropped,
    }
    return metrics, items


def windows_over(tokens: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first scored position) of windows over a text; every position after the first is scored once.

    ``stride == length``: disjoint windows. Below it they overlap, and only what the one before did not score counts.
    """
    windows, scored = [], 1
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        if end > scored:
            windows.append((begin, end, max(scored, begin + 1)))
            scored = end
        if end == tokens:
            break
    return windows


def text_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    *,
    length: int,
    stride: int,
    batch_size: int = 32,
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Loss and perplexity over each row's whole text in windows of ``length`` tokens, ``stride`` apart.

    Disjoint windows do not score their first token, which has no context there. Besides the token's, the figures
    per word and per byte, which do not depend on the tokenizer. Raises DataError for rows without text, or for a
    window beyond the context; ConfigError for a stride above the length.
    """
    context = describe(model).context_length
    if context is not None and length > context:
        raise DataError(
            f"a window of {length} tokens exceeds the model's context of {context}: lower the length"
        )
    if stride > length:
        raise ConfigError(f"stride={stride} above length={length} would leave tokens out: lower the stride")
    texts = [_text_of(row) for row in rows]
    pieces, owners = [], []
    for index, text in enumerate(texts):
        ids = document_ids(text, tokenizer)
        for begin, end, first in windows_over(len(ids), length, stride):
            labels = [IGNORE_INDEX] * (first - begin) + ids[first:end]
            pieces.append({"input_ids": ids[begin:end], "labels": labels})
            owners.append(index)
    losses = sequence_losses(model, pieces, tokenizer.pad_token_id, batch_size)
    totals = [[0.0, 0] for _ in texts]
    for owner, (value, count) in zip(owners, losses, strict=True):
        totals[owner][0] += value
        totals[owner][1] += count
    nats, tokens = math.fsum(value for value, _ in totals), sum(int(count) for _, count in totals)
    if tokens == 0:
        raise DataError("the text has no token with one before it: give a longer text")
    words = sum(len(text.split()) for text in texts)
    octets = sum(len(text.encode()) for text in texts)
    items = [
        {"id": row["example_id"], "loss": value / max(count, 1), "tokens": count}
        for row, (value, count) in zip(rows, totals, strict=True)
    ]
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "word_perplexity": math.exp(min(nats / max(words, 1), 700)),
        "bits_per_byte": nats / max(octets, 1) / math.log(2),
        "tokens": tokens,
        "rows": len(items),
        "stride": stride,
    }, items


def document_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a whole document, however long, with what the tokenizer puts around one."""
    if len(text) <= LONG:
        return list(tokenizer(text, verbose=False)["input_ids"])
    ids, _, _ = tokenise_long(text, [(0, len(text))], encoder(tokenizer), add_special_tokens=True)
    return [int(token) for token in ids]


def _text_of(row: RawRow) -> str:
    text = row.get("text")
    if text is None and row.get("prompt") is not None:
        text = row["prompt"] + row["completion"]
    if text is None:
        raise DataError(
            "windows over text need rows with a text, or with prompt and completion: use windows: rows"
        )
    return str(text)
