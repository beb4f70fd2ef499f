"""From a normalised row to token ids and an exact label mask.

The mask comes from *one* tokenisation of prompt + completion, never from tokenising a prefix again, and is a range
of token indices (``spans``). A prompt's trailing spaces move to the completion, in training and in generation
alike: most tokenizers join a space to the word after it (``"is: " + "She"`` is ``is | : | ĠShe``), so a prompt
that ends in a space would be tokenised differently with and without its completion. The text as a whole is
unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy

from headgate.data.readers.base import RawRow, Row
from headgate.data.spans import Ids
from headgate.errors import DataError

from .long_text import LONG, tokenise_long
from .rendering import chat_text, render
from .spans import Span, edges, encoder, token_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
__all__ = ["IGNORED", "PromptTooLong", "encode", "encode_rows", "prompt_ids"]


class PromptTooLong(DataError):
    """A prompt that leaves no room for its completion."""


class EncodedRow:
    """Token ids of one row, and the index ranges that are trained."""

    __slots__ = ("ids", "ranges")

    def __init__(self, ids: Ids, ranges: list[Span]) -> None:
        self.ids, self.ranges = ids, ranges

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that is trained."""
        return self.ranges[0][0] if self.ranges else len(self.ids)

    def labels(self) -> Ids:
        labels = numpy.full(len(self.ids), IGNORED, dtype=numpy.int32)
        for start, stop in self.ranges:
            labels[start:stop] = self.ids[start:stop]
        return labels


def encode_rows(
    rows: Sequence[Mapping[str, object]], tokenizer: PreTrainedTokenizerBase, loss_on: str
) -> list[EncodedRow]:
    """Every row, whole. Texts go through the tokenizer in batches; nothing is cut here."""
    backend = encoder(tokenizer)
    rendered = [render(row, tokenizer, loss_on) for row in rows]
    results: list[EncodedRow | None] = [None] * len(rows)
    for chat in (False, True):
        chosen = [i for i, (text, _, is_chat) in enumerate(rendered) if is_chat is chat and len(text) <= LONG]
        encodings = backend.encode_batch([rendered[i][0] for i in chosen], add_special_tokens=not chat)
        for index, encoding in zip(chosen, encodings, strict=True):
            ranges = token_ranges(encoding, rendered[index][1])
            results[index] = _ended(
                numpy.asarray(encoding.ids, dtype=numpy.int32), ranges, edges(encoding)[1], tokenizer, chat
            )
    for index, (text, spans, chat) in enumerate(rendered):
        if results[index] is None:
            ids, ranges, stop = tokenise_long(text, spans, backend, add_special_tokens=not chat)
            results[index] = _ended(ids, ranges, stop, tokenizer, chat)
    return [result for result in results if result is not None]


def _ended(
    ids: Ids, ranges: list[Span], stop: int, tokenizer: PreTrainedTokenizerBase, chat: bool
) -> EncodedRow:
    """With the end of sequence after the completion, trained; a chat template writes its own end.

    Where the tokenizer ends texts with something else (BERT's ``[SEP]``), that is left out.
    """
    eos = tokenizer.eos_token_id
    if chat or eos is None:
        return EncodedRow(ids, ranges)
    if stop < len(ids) and ids[stop] == eos:
        ids = ids[: stop + 1]
    else:
        ids = numpy.append(ids[:stop], numpy.int32(eos))
    if ranges and ranges[-1][1] == stop:
        ranges[-1] = (ranges[-1][0], stop + 1)
    else:
        ranges.append((stop, stop + 1))
    return EncodedRow(ids, ranges)


def encode(
    row: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    loss_on: str = "completion",
) -> Row:
    """``input_ids``, ``labels``, ``length``, ``prompt_length`` (tokens before the first label), ``truncated``.

    ``loss_on``: ``completion`` (the last assistant turn of messages), ``assistant`` (all of them) or ``all``. The
    end-of-sequence token follows the completion and is trained. Raises DataError naming the row where the prompt
    alone fills ``max_length``, and for tokenizers without offsets.
    """
    whole = encode_rows([row], tokenizer, loss_on)[0]
    ids, labels = whole.ids.tolist(), whole.labels().tolist()
    truncated = max_length is not None and len(ids) > max_length
    if truncated:
        check_room(row, whole, max_length)
        ids, labels = ids[:max_length], labels[:max_length]
    return {
        "input_ids": ids,
        "labels": labels,
        "length": len(ids),
        "prompt_length": min(whole.prompt_length, len(ids)),
        "truncated": truncated,
    }


def check_room(row: Mapping[str, object], whole: EncodedRow, max_length: int | None) -> None:
    """Raise PromptTooLong where truncation would leave no trained token."""
    if max_length is not None and whole.prompt_length >= max_length and row.get("text") is None:
        raise PromptTooLong(
            f"row '{row.get('example_id', '?')}': the prompt alone has {whole.prompt_length} tokens, max_length is "
            f"{max_length}: raise data.max_length (within the model's context), or leave such rows out with "
            "data.long_prompts: drop"
        )


def prompt_ids(row: RawRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids to generate from: what ``encode`` puts before the completion."""
    if row.get("messages") is not None:
        turns = list(row["messages"])
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        text = chat_text(tokenizer, turns, row.get("tools"), generation=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    encoding = encoder(tokenizer).encode(row["prompt"].rstrip(" "))
    return list(encoding.ids[: edges(encoding)[1]])
