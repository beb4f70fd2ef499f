"""Batched, left-padded, cached generation whose results do not depend on the batch size.

Prompts are put with others of similar length, every continuation has a limit of its own, and sampling draws from
one generator per prompt: neither the batch nor the order of the prompts reaches a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from headgate.data.templates import prompt_ids
from headgate.errors import ConfigError, DataError
from headgate.models.anatomy import unwrap
from headgate.models.aside import look_aside
from headgate.ops.randomness import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """One continuation. ``truncated``: it hit the token limit or the context before an end.

    ``ended``: by the end-of-sequence token or a stop string. ``prompt_truncated``: the prompt's beginning was cut
    to leave room in the context.
    """

    text: str
    tokens: int
    truncated: bool
    ended: bool
    prompt_truncated: bool = False


class Decoding(TypedDict, total=False):
    """How ``generate`` decodes: those of its keywords that say what text comes out."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    seed: int
    custom_generate: Callable[..., Tensor]


class GumbelSampling(LogitsProcessor):
    """Sampling as an argmax: ``argmax(log p + Gumbel noise)`` is distributed as ``p``.

    Each row has its own generator, so a sample depends on its prompt and seed alone. Nucleus first (Holtzman et
    al. 2020): the smallest set of tokens whose probability reaches ``top_p``.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float() / self.temperature
        if self.top_p < 1:
            ordered, places = logits.sort(descending=True)
            mass = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.scatter(-1, places, ordered.masked_fill(mass >= self.top_p, -torch.inf))
        uniform = torch.stack([torch.rand(logits.shape[-1], generator=g) for g in self.generators])
        noise = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        return logits + noise.to(logits.device)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    streamer: BaseStreamer | None = None,
    custom_generate: Callable[..., Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt (text, or token ids) until the end of sequence, a stop string, the limit or the context.

    A continuation that would leave the context is truncated there; a prompt that fills the context loses its
    beginning. Both are flagged. ``custom_generate``: another decoding method, as transformers takes one; it draws its own
    samples. The text of a stop string and what follows it are not part of the result.
    Raises DataError for an empty prompt.
    """
    if do_sample and temperature <= 0:
        raise ConfigError(
            f"temperature={temperature:g} must be above 0: for greedy decoding leave sampling off"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p:g} must be in (0, 1]")
    context = context_length(model)
    room = context - min(max_new_tokens, context // 2)
    encoded, cut = [], []
    for index, prompt in enumerate(prompts):
        ids = prompt_ids({"prompt": prompt}, tokenizer) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise DataError(f"prompt {index} is empty: give it some text or a beginning-of-sequence token")
        cut.append(len(ids) >= context)
        encoded.append(ids[-room:] if cut[-1] else ids)
    results: list[Generation | None] = [None] * len(encoded)
    by_itself = do_sample and custom_generate is not None
    ends, done = end_tokens(model, tokenizer), 0
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    with _evaluating(model):
        for indices in batches([len(ids) for ids in encoded], batch_size, room):
            width = max(len(encoded[i]) for i in indices)
            rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in indices]
            mask = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in indices]
            extra: dict[str, object] = {"streamer": streamer} if streamer is not None else {}
            if (
                custom_generate is not None
            ):  # transformers hands its streamer to its own decoding methods only
                extra["custom_generate"] = (
                    custom_generate if streamer is None else partial(custom_generate, streamer=streamer)
                )
            if by_itself:
                torch.manual_seed(derive_seed(seed, "generation", indices[0]))
            elif do_sample:
                seeds = [derive_seed(seed, "generation", i) for i in indices]
                extra["logits_processor"] = LogitsProcessorList([GumbelSampling(seeds, temperature, top_p)])
            if stop:
                extra |= {"stop_strings": list(stop), "tokenizer": tokenizer}
            output = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=GenerationConfig(
                    max_new_tokens=min(max_new_tokens, context - width),
                    do_sample=by_itself,
                    pad_token_id=pad,
                    eos_token_id=ends,
                    **({"top_k": 0, "temperature": temperature, "top_p": top_p} if by_itself else {}),
                ),
                **extra,
            )
            for row, index in enumerate(indices):
                results[index] = _result(output[row, width:].tolist(), tokenizer, ends, stop, cut[index])
            done += len(indices)
            if progress is not None:
                progress(done, len(encoded))
    return [result for result in results if result is not None]


def batches(lengths: Sequence[int], batch_size: int, room: int) -> Iterator[list[int]]:
    """Indices by length. Prompts that leave less than the whole limit only go with others of their own length."""
    held: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        tight = lengths[index] > room
        if held and (len(held) == batch_size or (tight and lengths[index] != lengths[held[0]])):
            yield held
            held = []
        held.append(index)
    if held:
        yield held


def _result(
    new: list[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    stop: Sequence[str],
    prompt_truncated: bool,
) -> Generation:
    at = next((i for i, token in enumerate(new) if token in ends), None)
    kept = new if at is None else new[:at]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    first = min((place for word in stop if (place := text.find(word)) >= 0), default=None)
    ended = at is not None or first is not None
    return Generation(text[:first], len(kept), not ended, ended, prompt_truncated)


def context_length(model: nn.Module) -> int:
    """Positions that the model was made for."""
    config = unwrap(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a sequence: the tokenizer's, and a chat model's own."""
    own = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *listed] if i is not None))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, without the decoding defaults that a model brings along (repetition penalties, top-k)."""
    holders = [m for m in (model, unwrap(model)) if getattr(m, "generation_config", None) is not None]
    kept = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        with look_aside(model):
            yield
    finally:
        for holder, own in zip(holders, kept):
            holder.generation_config = own


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, raw: bool = False
) -> list[int]:
    """The ids to answer a conversation from: in the model's chat template, or the last turn's text without one."""
    if raw or getattr(tokenizer, "chat_template", None) is None:
        return prompt_ids({"prompt": turns[-1]["content"]}, tokenizer)
    return prompt_ids({"messages": list(turns)}, tokenizer)
