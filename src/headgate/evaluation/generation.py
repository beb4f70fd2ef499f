"""Batched, left-padded, cached generation whose results do not depend on the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headgate.data.templates import prompt_ids
from headgate.errors import DataError
from headgate.models.anatomy import unwrap


@dataclass(frozen=True)
class Generation:
    """One continuation. ``truncated``: it hit the token limit or the context before an end of sequence."""

    text: str
    tokens: int
    truncated: bool
    ended: bool


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt (text, or token ids) until the end-of-sequence token, the token limit or the context's end.

    Prompts are batched with others of similar length, padded on the left. A prompt that fills the context
    raises DataError; a limit beyond the context is cut per batch and counted as truncation.
    """
    context = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    eos = tokenizer.eos_token_id
    encoded = [
        prompt_ids({"prompt": prompt}, tokenizer) if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    for index, ids in enumerate(encoded):
        if not ids:
            raise DataError(f"prompt {index} is empty: give it some text or a beginning-of-sequence token")
        if len(ids) >= context:
            raise DataError(f"prompt {index} has {len(ids)} tokens, the model's context is {context}")
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    results: list[Generation | None] = [None] * len(encoded)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        width = max(len(encoded[i]) for i in indices)
        allowed = min(max_new_tokens, context - width)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in indices], device=device)
        mask = torch.tensor(
            [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in indices], device=device
        )
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + start)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=allowed,
                pad_token_id=pad,
                eos_token_id=eos,
                **(sampling or {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
            )
        for row, index in enumerate(indices):
            new = output[row, width:].tolist()
            ended = eos in new
            kept = new[: new.index(eos)] if ended else new
            results[index] = Generation(
                tokenizer.decode(kept, skip_special_tokens=True), len(kept), truncated=not ended, ended=ended
            )
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    model.train(was_training)
    return [result for result in results if result is not None]
