"""A first forward of the same batch, adapters and routing off, for the router to read: ``features: prepass``.

Its final hidden state has seen every block, at the price of one more forward without a graph. While decoding it
continues a key-value cache of its own, which the model's cache carries and beam search reorders with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import LongTensor, Tensor
from transformers import DynamicCache

from headgate.errors import ModelError
from headgate.models.anatomy import Anatomy, BackboneOutput
from headgate.models.aside import look_aside
from headgate.models.block_parts import Call

if TYPE_CHECKING:
    from transformers import Cache


class PrepassCache:
    """The first forward's own cache."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def reordered(self, rows: LongTensor) -> PrepassCache:
        self.cache.reorder_cache(rows)
        return self


def prepass(
    anatomy: Anatomy,
    backbone: Callable[..., BackboneOutput],
    call: Call,
    past: int,
    name: str,
    *,
    caches: bool,
) -> tuple[Tensor, PrepassCache | None]:
    """Final hidden states ``[B, T, H]`` (after the last norm) and the cache to continue, if ``caches``.

    ``call`` is what the backbone is called with, ``past`` the length of its cache, ``name`` the attribute under which
    that cache carries this method's own (two methods may both read ahead). Raises ModelError for a cache
    that was filled without a first forward, or shortened since.
    """
    if call.get("cache") is not None:
        raise ModelError(
            "features: prepass continues a cache of its own, which continuous batching has no room for: generate without "
            "it (`transformers serve` without --continuous-batching)"
        )
    kept: PrepassCache | None = getattr(call.get("past_key_values"), name, None)
    seen = int(kept.cache.get_seq_length()) if kept is not None else 0
    if seen != past:
        raise ModelError(
            f"features: prepass has seen {seen} of the {past} tokens in this cache (it was filled without one, or "
            "shortened by assisted decoding): start with an empty cache, without an assistant model"
        )
    kept = (kept or PrepassCache(DynamicCache())) if caches else None
    own = {"past_key_values": kept.cache if kept is not None else None, "use_cache": kept is not None}
    with look_aside(anatomy.model, adapters=False):
        hidden = backbone(**{**call, **own}).last_hidden_state
    return hidden, kept
