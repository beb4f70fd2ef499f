"""What a forward is about: real tokens, documents, places within them, and what a cache remembers of a route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headgate.errors import ModelError

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


@dataclass
class Context:
    """Of one forward: ``valid`` ``[B, T]``, ``document`` numbers, ``offset`` of each token in its document, ids.

    ``paged``: a step of continuous batching: one row holds a stretch of every request, and keys and values lie in a cache
    that attention alone writes.
    """

    valid: Tensor
    document: Tensor
    offset: Tensor
    ids: Tensor | None
    num_documents: int
    memory: Memory | None
    past: int = 0
    paged: bool = False

    @property
    def packed(self) -> bool:
        """Whether a row may hold several documents."""
        return self.paged or self.num_documents > len(self.valid)

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
    def read(cls, call: Mapping[str, Any], name: str = MEMORY) -> Context:
        """From the backbone's keyword arguments. Raises ModelError where the mask does not say what is padding."""
        ids = call.get("input_ids")
        given = ids if ids is not None else call["inputs_embeds"]
        rows, length, device = given.shape[0], given.shape[1], given.device
        cache = call.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        memory = getattr(cache, name, None)
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        number = torch.arange(rows, device=device).unsqueeze(1).expand(rows, length)
        ends = call.get("cu_seq_lens_q")
        if call.get("cache") is not None and ends is not None and positions is not None:
            place = torch.arange(length, device=device)
            document = torch.searchsorted(ends[1:].contiguous().to(device), place, right=True).unsqueeze(0)
            real = torch.ones_like(number, dtype=torch.bool)
            return cls(real, document, positions, ids, int(ends.shape[0]), None, paged=True)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                shape = list(mask.shape) if isinstance(mask, Tensor) else sorted(mask)
                raise ModelError(
                    f"routing needs a 2-d attention_mask [B, T], got {shape}: real tokens "
                    "cannot be told from a prepared one (a static cache in a forward of one's own: hand the padding mask "
                    "on, the model prepares its own)"
                )
            real = mask.bool()
            offset = (real.long().cumsum(1) - 1)[:, -length:]
            return cls(real[:, -length:], number, offset, ids, rows, memory, past)
        if positions is not None and past == 0 and length > 1 and bool((positions[:, 1:] == 0).any()):
            positions = positions.expand(rows, length)
            start = positions == 0
            document = start.long().cumsum(1) - 1 + number * length
            size = torch.bincount(document.flatten(), minlength=rows * length)
            # a document of one token is padding: the collator gives pads position 0, and it predicts nothing
            return cls(size[document] > 1, document, positions, ids, rows * length, None)
        offset = torch.arange(past, past + length, device=device).expand(rows, length)
        return cls(torch.ones_like(number, dtype=torch.bool), number, offset, ids, rows, memory, past)


def padding_mask_alone(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Stands in for transformers' ``create_masks_for_generate``, which prepares 4-d masks for caches of fixed length.

    What is padding can only be read from the 2-d mask; the backbone makes the same 4-d ones from it.
    """
    return attention_mask


PREPARED_MASKS = "create_masks_for_generate"
