"""What a forward is about: real tokens, documents, places within them, and what a cache remembers of a route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headgate.errors import ModelError
from headgate.models.block_parts import Call

MEMORY = "headgate_route"


@dataclass
class Memory:
    """Sum and number of each row's prefix tokens so far; lives on the cache and is reordered with it."""

    total: Tensor
    count: Tensor

    def reordered(self, rows: Tensor) -> Memory:
        return Memory(self.total[rows], self.count[rows])


def remember(cache: Any, memory: Any, name: str = MEMORY) -> None:
    """Keep ``memory`` on the cache; beam search, which reorders the cache, reorders it too."""
    if not hasattr(cache, name):
        original = cache.reorder_cache

        def reorder(beam_idx: Tensor) -> None:
            original(beam_idx)
            setattr(cache, name, getattr(cache, name).reordered(beam_idx))

        cache.reorder_cache = reorder
    setattr(cache, name, memory)


class Places(NamedTuple):
    """``[B, T]`` each: which tokens are real, the number of each one's document, and its place there."""

    valid: Tensor
    document: Tensor
    offset: Tensor


@dataclass
class Context:
    """Of one forward over ``rows`` texts: ``valid`` ``[B, T]``, ``document`` numbers, ``offset`` of each token in its document.

    ``source``: those three, or what makes them: a decoding step whose route is known never asks. ``paged``: a step of
    continuous batching: one row holds a stretch of every request, and keys and values lie in a cache that attention alone
    writes.
    """

    source: Places | Callable[[], Places]
    ids: Tensor | None
    rows: int
    num_documents: int
    memory: Memory | None
    past: int = 0
    paged: bool = False

    @cached_property
    def places(self) -> Places:
        return self.source if isinstance(self.source, Places) else self.source()

    @property
    def valid(self) -> Tensor:
        return self.places.valid

    @property
    def document(self) -> Tensor:
        return self.places.document

    @property
    def offset(self) -> Tensor:
        return self.places.offset

    @property
    def packed(self) -> bool:
        """Whether a row may hold several documents."""
        return self.paged or self.num_documents > self.rows

    def needs_memory(self, what: str) -> None:
        """Raises ModelError where ``what`` would have to be remembered of requests that this step only continues."""
        begins = torch.ones_like(self.valid[:, :1])
        begins = (
            torch.cat([begins, self.document[:, 1:] != self.document[:, :-1]], 1) if self.paged else begins
        )
        if self.paged and bool((begins & (self.offset != 0)).any()):
            self.refuse_paged(what)

    def refuse_paged(self, what: str) -> None:
        """Raises ModelError in a step of continuous batching."""
        if self.paged:
            raise ModelError(
                f"{what} keeps something beside the cache, which continuous batching has no room for: generate without "
                "it (`transformers serve` without --continuous-batching)"
            )

    @classmethod
    def read(cls, call: Call, name: str = MEMORY) -> Context:
        """From the backbone's keyword arguments. Raises ModelError where the mask does not say what is padding."""
        ids = call.get("input_ids")
        given = ids if ids is not None else call["inputs_embeds"]
        rows, length, device = given.shape[0], given.shape[1], given.device
        cache = call.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        # an emptied cache starts other texts: what it remembered was of the last ones
        memory = getattr(cache, name, None) if past else None
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        ends = call.get("cu_seq_lens_q")
        if call.get("cache") is not None and ends is not None and positions is not None:
            source = partial(_paged, ends, positions)
            return cls(source, ids, rows, int(ends.shape[0]), None, paged=True)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                shape = list(mask.shape) if isinstance(mask, Tensor) else sorted(mask)
                raise ModelError(
                    f"routing needs a 2-d attention_mask [B, T], got {shape}: real tokens "
                    "cannot be told from a prepared one (a static cache in a forward of one's own: hand the padding mask "
                    "on, the model prepares its own)"
                )
            return cls(partial(_masked, mask, length), ids, rows, rows, memory, past)
        if positions is not None and past == 0 and length > 1 and bool((positions[:, 1:] == 0).any()):
            return cls(_packed(positions.expand(rows, length)), ids, rows, rows * length, None)
        return cls(partial(_whole, rows, length, past, device), ids, rows, rows, memory, past)


def _numbers(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device).unsqueeze(1).expand(rows, length)


def _whole(rows: int, length: int, past: int, device: torch.device) -> Places:
    """No mask: every token is real, every row a document."""
    number = _numbers(rows, length, device)
    offset = torch.arange(past, past + length, device=device).expand(rows, length)
    return Places(torch.ones_like(number, dtype=torch.bool), number, offset)


def _masked(mask: Tensor, length: int) -> Places:
    """By the padding mask ``[B, past + T]``."""
    real = mask.bool()
    offset = (real.long().cumsum(1) - 1)[:, -length:]
    return Places(real[:, -length:], _numbers(len(mask), length, mask.device), offset)


def _packed(positions: Tensor) -> Places:
    """A position of 0 begins a document. One of a single token is padding: the collator gives pads position 0."""
    rows, length = positions.shape
    document = (positions == 0).long().cumsum(1) - 1 + _numbers(rows, length, positions.device) * length
    size = torch.bincount(document.flatten(), minlength=rows * length)
    return Places(size[document] > 1, document, positions)


def _paged(ends: Tensor, positions: Tensor) -> Places:
    """Continuous batching: one row, a stretch of every request."""
    place = torch.arange(positions.shape[-1], device=positions.device)
    document = torch.searchsorted(ends[1:].contiguous().to(place.device), place, right=True).unsqueeze(0)
    return Places(torch.ones_like(document, dtype=torch.bool), document, positions)


def padding_mask_alone(attention_mask: Tensor | None = None, **_: object) -> Tensor | None:
    """Stands in for transformers' ``create_masks_for_generate``, which prepares 4-d masks for caches of fixed length.

    What is padding can only be read from the 2-d mask; the backbone makes the same 4-d ones from it.
    """
    return attention_mask


PREPARED_MASKS = "create_masks_for_generate"
