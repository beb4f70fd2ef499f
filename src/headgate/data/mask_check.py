"""The trained tokens of a sample, decoded and set against the source: a mask that is off stops the run.

Tokenizers decode in their own ways (a leading space is dropped, letters are lowered, white space is joined), so
what is expected is the source passed through the same tokenizer, and only what stands at the edges may differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from headgate.errors import DataError

from .rendering import render
from .spans import encoder
from .templates import EncodedRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SAMPLE = 32


def check_masks(
    rows: Sequence[Mapping[str, object]],
    encoded: Sequence[EncodedRow],
    tokenizer: PreTrainedTokenizerBase,
    loss_on: str,
) -> int:
    """Rows compared, spread over ``rows``. Raises DataError naming the row, what is trained and what should be."""
    step = max(1, len(rows) // SAMPLE)
    places = range(0, len(rows), step)
    for place in places:
        difference = mask_difference(rows[place], encoded[place], tokenizer, loss_on)
        if difference is not None:
            trained, source, spelled = difference
            message = (
                f"row '{rows[place].get('example_id', '?')}': the trained tokens read {_short(trained)}, the source "
                f"{_short(source)}: the offsets of {type(tokenizer).__name__} cannot be trusted; use another tokenizer"
            )
            if spelled:
                raise DataError(message)
            warnings.warn(
                message, stacklevel=2
            )  # a tokenizer that changes its text cannot be compared to the letter
    return len(places)


def mask_difference(
    row: Mapping[str, object], encoded: EncodedRow, tokenizer: PreTrainedTokenizerBase, loss_on: str
) -> tuple[str, str, bool] | None:
    """(what is trained, what should be, whether this tokenizer spells the row exactly), or None where they agree."""
    text, spans, chat = render(row, tokenizer, loss_on)
    backend = encoder(tokenizer)

    def decode(ids: Sequence[int]) -> str:
        return str(backend.decode(list(ids), skip_special_tokens=False))

    eos = tokenizer.eos_token_id
    whole = decode(_content(encoded, 0, len(encoded.ids), eos, backend, chat))
    lossless = whole.lstrip(" ") == text.lstrip(" ")
    for (low, high), (start, stop) in zip(spans, encoded.ranges):
        ids = _content(encoded, start, stop, eos, backend, chat)
        trained = decode(ids)
        source = text[low:high]
        if not lossless:
            source = decode(backend.encode(source, add_special_tokens=False).ids)
        if not _agree(trained, source, len(decode(ids[:1])), lossless):
            return trained, source, lossless
    if len(encoded.ranges) < len([span for span in spans if text[span[0] : span[1]].strip()]):
        return "", text[spans[-1][0] : spans[-1][1]], lossless
    return None


def _content(
    encoded: EncodedRow, start: int, stop: int, eos: int | None, backend: Tokenizer, chat: bool
) -> list[int]:
    """The ids of a range without what was put around the text; a chat template writes that itself."""
    ids: list[int] = encoded.ids[start:stop].tolist()
    if chat:
        return ids
    if eos is not None and stop == len(encoded.ids) and ids and ids[-1] == eos:
        ids = ids[:-1]
    if start == 0:
        around = backend.encode("a").special_tokens_mask
        while around and around[0] and ids:
            ids, around = ids[1:], around[1:]
    return ids


def _agree(trained: str, source: str, first: int, lossless: bool) -> bool:
    """Equal, apart from one leading space that decoding drops and a first token that reaches back over the boundary."""
    if not lossless:
        trained, source = "".join(trained.split()), "".join(source.split())
    trained = trained.lstrip("\ufffd")  # a first token that ends inside a character of the prompt
    return any(
        trained == wanted or (trained.endswith(wanted) and len(trained) - len(wanted) < max(first, 1))
        for wanted in {source, source.removeprefix(" ")}
    )


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[: limit // 2] + " ... " + text[-limit // 2 :])
