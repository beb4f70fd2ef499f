"""From character spans of a text to token indices, exact for every fast tokenizer.

Byte-level tokenizers with ``trim_offsets`` (GPT-NeoX, Pythia, OLMo, RoBERTa) report offsets without the white space
that a token really holds: a run of spaces gets an empty span. Their ids do not depend on it, so texts are encoded
by a copy that does not trim, and what is trained is decided by the index of a token, between two boundaries that
are found by bisection over the tokens' ends. Where the ends themselves lie, ``mask_check`` says so.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from headgate.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Span = tuple[int, int]
Ids = npt.NDArray[np.int32]
_UNTRIMMED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Tokenizer] = weakref.WeakKeyDictionary()


def encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The ``tokenizers.Tokenizer`` of a fast tokenizer, without truncation, padding or trimmed offsets.

    Raises DataError naming the class of a tokenizer that gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, so completions cannot be told from prompts "
            "exactly: load the fast tokenizer"
        )
    backend = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer
    if tokenizer in _UNTRIMMED:
        backend = _UNTRIMMED[tokenizer]
    elif backend.post_processor is not None:
        state = backend.post_processor.__getstate__()
        if b'"trim_offsets":true' in state:
            backend, post = copy.deepcopy(backend), copy.deepcopy(backend.post_processor)
            post.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
            backend.post_processor = post
            _UNTRIMMED[tokenizer] = backend
    backend.no_truncation()
    backend.no_padding()
    return backend


def edges(encoding: Encoding) -> Span:
    """(first, stop): the indices of the tokens that stand for text; what the tokenizer puts around them is outside."""
    special = encoding.special_tokens_mask
    first, stop = 0, len(special)
    while first < stop and special[first]:
        first += 1
    while stop > first and special[stop - 1]:
        stop -= 1
    return first, stop


def token_ranges(encoding: Encoding, spans: Sequence[Span]) -> list[Span]:
    """Index ranges of the tokens that reach into the character spans, in order; one across a boundary is inside."""
    first, stop = edges(encoding)
    ranges: list[Span] = []
    for low, high in spans:
        begin = _bisect(encoding, first, stop, lambda start, end, low=low: end > low)
        end = _bisect(encoding, begin, stop, lambda start, end, high=high: start >= high)
        if ranges and begin < ranges[-1][1]:
            begin = ranges[-1][1]
        if end > begin:
            ranges.append((begin, end))
    return ranges


def _bisect(encoding: Encoding, low: int, high: int, beyond: Callable[..., bool]) -> int:
    """The first index in [low, high) whose (start, end) is ``beyond``; offsets never decrease."""
    while low < high:
        middle = (low + high) // 2
        chars = encoding.token_to_chars(middle)
        if chars is not None and beyond(*chars):
            high = middle
        else:
            low = middle + 1
    return low
