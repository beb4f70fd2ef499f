"""Looks at data through the bare model: no adapter, no expert, no dropout, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headgate.methods.documents import documents_of
from headgate.models.anatomy import Batch, describe
from headgate.models.aside import look_aside
from headgate.models.surgery import head_bypassed
from headgate.ops.novelty import document_means
from headgate.ops.randomness import derive_seed

Bypass = Callable[[], AbstractContextManager[object]]
REFERENCE_ROWS, REFERENCE_TOKENS = 32, 64


class Look(NamedTuple):
    """Documents as the bare model reads them: ``[N, H]`` fp32 mean final hidden states and ``[N]`` token counts."""

    embeddings: Tensor
    tokens: Tensor


@contextmanager
def bare(model: nn.Module, bypassed: Bypass = nullcontext) -> Iterator[None]:
    """Inside, the model answers as its base does: PEFT adapters off, and the method's own part by ``bypassed``."""
    with look_aside(model, adapters=False), bypassed():
        yield


def skill_embeddings(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    min_samples: int = 32,
    min_tokens: int = 2048,
    bypassed: Bypass = nullcontext,
) -> Look:
    """Every document of the first batches.

    Takes batches until there are ``min_samples`` documents and ``min_tokens`` tokens, or no more batches. In packed
    rows every document counts; padding enters nothing.
    """
    anatomy = describe(model)
    means, tokens = [torch.zeros(0, anatomy.hidden_size)], [torch.zeros(0, dtype=torch.long)]
    samples = count = 0
    with bare(model, bypassed), head_bypassed(anatomy.head) as captured:
        for batch in batches:
            inputs = {
                name: batch[name]
                for name in ("input_ids", "attention_mask", "position_ids")
                if batch.get(name) is not None
            }
            anatomy.model(**inputs, use_cache=False)
            means_NH, tokens_N = document_means(captured.pop(), documents_of(batch))
            means.append(means_NH.cpu())
            tokens.append(tokens_N.cpu())
            samples, count = samples + len(tokens_N), count + int(tokens_N.sum())
            if samples >= min_samples and count >= min_tokens:
                break
    return Look(torch.cat(means), torch.cat(tokens))


def reference_text(
    model: nn.Module,
    seed: int,
    bypassed: Bypass = nullcontext,
    shape: tuple[int, int] = (REFERENCE_ROWS, REFERENCE_TOKENS),
) -> dict[str, Tensor]:
    """What the bare model writes by itself, as a batch of documents of so many tokens (32 of 64).

    It needs no data. Its token mean is what every skill's embedding has in common: the first skill of a stream
    could not be centred by skills that are still to come. And it is what a Bayes router knows the base by.
    """
    anatomy: Any = describe(model)
    (rows, tokens), device = shape, next(anatomy.model.parameters()).device
    config = anatomy.model.generation_config
    start = next((t for t in (config.bos_token_id, config.eos_token_id) if t is not None), 0)
    start = start[0] if isinstance(start, list) else start
    cuda = [device.index or 0] if device.type == "cuda" else []
    with bare(model, bypassed), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(derive_seed(seed, "skill_library.reference"))
        written = anatomy.model.generate(
            torch.full((rows, 1), start, device=device),
            attention_mask=torch.ones(rows, 1, dtype=torch.long, device=device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=start,
        )
    return {"input_ids": written, "attention_mask": torch.ones_like(written)}
