"""What tokens that skip a block leave in its keys and values: all (``full``), nothing, or those of a block below.

    full    K_l(j) = k_l(x_j), open or not
    drop    no K_l(j) where g_j = 0; a query always sees itself
    reuse   K_l(j) = g_j k_l(x_j) + (1 - g_j) K_{l-1}(j), hard gates: those of the last block where j ran

``drop`` is a mask, the same for both engines; the sparse one leaves zeros behind it, so the cache stays rectangular
instead of ragged, and which tokens were open is kept on the cache. ``reuse`` needs nothing from earlier steps: a block's
cache already holds what its earlier tokens reuse. Keys are reused as they attend, positions included.

Legend: B batch, T tokens of this forward, K keys (cached ones first), N key-value heads, D head width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.errors import ModelError
from headgate.models.anatomy import Anatomy
from headgate.models.block_parts import ATTENTION_KINDS
from headgate.models.private import attention_implementation

if TYPE_CHECKING:
    from transformers import Cache

OPENED = "headgate_routing_open"


def check_kv(kv: str, anatomy: Anatomy) -> None:
    """Raises ModelError for a model that has no place for what ``kv`` leaves."""
    config = anatomy.model.config
    attention = attention_implementation(config)
    if kv == "drop" and attention not in ATTENTION_KINDS:
        raise ModelError(
            f"kv: drop is an attention mask, which attn_implementation {attention!r} does not take: set "
            "model.attn_implementation: sdpa"
        )
    if (
        kv == "reuse"
        and "past_key_values" not in inspect.signature(type(anatomy.blocks[0]).forward).parameters
    ):
        kind = config.get_text_config().model_type
        raise ModelError(f"no kv: reuse for architecture {kind!r}: use kv: drop or full")


@dataclass
class Opened:
    """``[B, K, G]`` bool: which gates were open for every token so far; lives on the cache."""

    gates: Tensor

    def reordered(self, rows: Tensor) -> Opened:
        return Opened(self.gates[rows])


def opened_so_far(weight: Tensor, shape: tuple[int, int], cache: Cache | None, past: int) -> Tensor:
    """``[B, past + T, G]`` bool.

    Raises ModelError for a cache whose earlier tokens were not routed with ``drop``, or with places still empty.
    """
    if getattr(cache, "is_compileable", False):
        raise ModelError(
            f"kv: drop needs a cache that grows with the text, not a {type(cache).__name__}: use a dynamic cache (leave "
            "cache_implementation out)"
        )
    now = (weight.detach() != 0).expand(*shape, -1)
    before: Opened | None = getattr(cache, OPENED, None)
    seen = before.gates.shape[1] if before is not None else 0
    if seen != past:
        raise ModelError(
            f"kv: drop knows the gates of {seen} of the {past} tokens in this cache (it was filled with routing off, or "
            "shortened by assisted decoding): start with an empty cache, without an assistant model"
        )
    return torch.cat([before.gates, now], 1) if before is not None else now


def without_closed(mask_BTK: Tensor | None, open_BK: Tensor, x_BTH: Tensor, *, boolean: bool) -> Tensor:
    """The attention mask ``[B, 1, T, K]`` with closed tokens seen by themselves only.

    ``boolean``: what to make where the model gave no mask (sdpa); otherwise an additive one (eager). Padding sees
    itself: a query that sees nothing has no softmax.

    Equation: layer_routing (kv drop): no K_l(j) where g_j = 0; a query sees itself
    Proved by: tests/layer_routing/test_kv.py::test_both_engines_are_the_formula
    """
    length, keys = x_BTH.shape[1], open_BK.shape[1] if mask_BTK is None else mask_BTK.shape[-1]
    place_K = torch.arange(keys, device=x_BTH.device)
    query_T1 = place_K[keys - length :].unsqueeze(1)
    closed = ~open_BK[:, None, None, -keys:]
    if mask_BTK is None:
        mask_BTK = (place_K <= query_T1).view(1, 1, length, keys)
        mask_BTK = mask_BTK if boolean else additive(mask_BTK, x_BTH.dtype)
    never = False if mask_BTK.dtype == torch.bool else torch.finfo(mask_BTK.dtype).min
    always = True if mask_BTK.dtype == torch.bool else 0.0
    return mask_BTK.masked_fill(closed, never).masked_fill(place_K == query_T1, always)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, the lowest number elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class Reuse:
    """Stands in for a block's cache and gives closed tokens the keys and values ``below``; then they are its ``own``.

    ``open_BT`` None: every token is open, nothing is replaced. Transformers' attention asks a cache for ``update`` only.
    """

    def __init__(
        self, cache: Cache | None, below: tuple[Tensor, Tensor] | None, open_BT: Tensor | None
    ) -> None:
        self.cache = getattr(cache, "self_attention_cache", cache)
        self.below, self.open_BT = below, open_BT
        self.own: tuple[Tensor, Tensor] | None = None

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """``[B, N, T, D]`` of the block's own; returns what it attends to, cached tokens included.

        Equation: layer_routing (kv reuse): K_l(j) = g_j k_l(x_j) + (1 - g_j) K_{l-1}(j)
        Proved by: tests/layer_routing/test_kv.py::test_both_engines_are_the_formula
        """
        if self.open_BT is not None:
            assert self.below is not None
            opened = self.open_BT[:, None, :, None]
            key, value = torch.where(opened, key, self.below[0]), torch.where(opened, value, self.below[1])
        if self.own is None:  # a recomputed block finds what its forward left
            self.own = key, value
        return (key, value) if self.cache is None else self.cache.update(key, value, layer, *args, **kwargs)
