"""From a normalised row to token ids and an exact label mask.

The mask comes from character offsets of *one* tokenisation of prompt + completion, never from tokenising a
prefix again. A prompt's trailing spaces move to the completion, in training and in generation alike: most
tokenizers join a space to the word after it (``"is: " + "She"`` is ``is | : | ĠShe``), so a prompt that ends in
a space would be tokenised differently with and without its completion. The text as a whole is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headgate.errors import DataError

IGNORED = -100
Span = tuple[int, int]


class PromptTooLong(DataError):
    """A prompt that leaves no room for its completion."""


def encode(
    row: Mapping[str, Any], tokenizer: Any, max_length: int | None = None, loss_on: str = "completion"
) -> dict[str, Any]:
    """``input_ids``, ``labels``, ``length``, ``prompt_length`` (tokens before the first label), ``truncated``.

    ``loss_on``: ``completion`` (the last assistant turn of messages), ``assistant`` (all of them) or ``all``. The
    end-of-sequence token follows the completion and is trained. Raises DataError naming the row where the prompt
    alone fills ``max_length``, and for tokenizers without offsets.
    """
    text, spans, chat = _render(row, tokenizer, loss_on)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, so completions cannot be told from prompts "
            "exactly: load the fast tokenizer"
        )
    encoded = tokenizer(
        text, add_special_tokens=not chat, return_offsets_mapping=True, truncation=False, verbose=False
    )
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    eos = tokenizer.eos_token_id
    labels = [token if _inside(offset, spans) else IGNORED for token, offset in zip(ids, offsets)]
    if not chat:
        if ids and ids[-1] == eos:
            labels[-1] = eos
        else:
            ids.append(eos)
            labels.append(eos)
    prompt_length = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    truncated = False
    if max_length is not None and len(ids) > max_length:
        truncated = True
        if prompt_length >= max_length and "text" not in row:
            raise PromptTooLong(
                f"row '{row.get('example_id', '?')}': the prompt alone has {prompt_length} tokens, max_length is "
                f"{max_length}: raise data.max_length (within the model's context), or leave such rows out with "
                "data.long_prompts: drop"
            )
        ids, labels = ids[:max_length], labels[:max_length]
    return {
        "input_ids": ids,
        "labels": labels,
        "length": len(ids),
        "prompt_length": min(prompt_length, len(ids)),
        "truncated": truncated,
    }


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The token ids to generate from: what ``encode`` puts before the completion."""
    if row.get("messages") is not None:
        turns = list(row["messages"])
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        text = _chat(tokenizer, turns, generation=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(row["prompt"].rstrip(" "))["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _inside(offset: Span, spans: Sequence[Span]) -> bool:
    """Whether a token reaches into a span; one that lies across a boundary is trained."""
    start, end = offset
    return end > start and any(low < end and start < high for low, high in spans)


def _render(row: Mapping[str, Any], tokenizer: Any, loss_on: str) -> tuple[str, list[Span], bool]:
    """The whole text, the character spans that are trained, and whether a chat template made it."""
    if row.get("messages") is not None:
        return *_conversation(row, tokenizer, loss_on), True
    if row.get("text") is not None:
        return row["text"], [(0, len(row["text"]))], False
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        raise DataError(
            f"row '{row.get('example_id', '?')}' has neither prompt and completion, messages nor text"
        )
    bare = prompt.rstrip(" ")
    text = prompt + completion
    return text, [(0 if loss_on == "all" else len(bare), len(text))], False


def _conversation(row: Mapping[str, Any], tokenizer: Any, loss_on: str) -> tuple[str, list[Span]]:
    """Assistant spans by rendering the conversation up to each turn: text prefixes, which are exact."""
    turns = list(row["messages"])
    where = f"row '{row.get('example_id', '?')}'"
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{where}: no message is from the assistant, so there is nothing to learn")
    text = _chat(tokenizer, turns, generation=False)
    if loss_on == "all":
        return text, [(0, len(text))]
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _chat(tokenizer, turns[:index], generation=True)
        until = _chat(tokenizer, turns[: index + 1], generation=False)
        if not text.startswith(until) or not until.startswith(before):
            raise DataError(
                f"{where}: the tokenizer's chat template rewrites earlier turns, so assistant tokens cannot be "
                "located exactly: set data.chat_template to a template that only appends"
            )
        spans.append((len(before), len(until.rstrip())))
    return text, spans[-1:] if loss_on == "completion" else spans


def _chat(tokenizer: Any, turns: list[dict[str, str]], *, generation: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the rows are conversations and the tokenizer has no chat template: set data.chat_template, choose an "
            "instruct model, or convert the rows to prompt and completion"
        )
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
