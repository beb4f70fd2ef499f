"""What the router reads, per token: nothing from the future, from padding, from another document, or stale.

    embedding  [rms(mean of e_s, s <= t), rms(e_t)]       mean and token are normalised apart: the mean of t embeddings
    block k    rms(h_t), the input of block k             is smaller by about sqrt(t) and would vanish beside the token
    prepass    rms(h_t), the final hidden state with every adapter off

With ``granularity: sequence`` the mean stops at the document's first ``prefix_tokens`` tokens, and is all there is.
A cache carries the sum and number of what the mean has seen, so that decoding equals recomputing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.methods.context import Context, Memory, remember
from headgate.ops.causal_mean import causal_mean

MEMORY = "headgate_experts"
"""Where a cache keeps the running mean."""


def router_features(hidden: Tensor, context: Context, *, prefix: int | None, pair: bool) -> Tensor:
    """``[B, T, F]`` fp32 features of ``hidden`` ``[B, T, H]``, without a gradient.

    ``prefix``: the mean counts only so many tokens of a document, and nothing else is read. ``pair``: mean and token
    side by side. Neither: the token alone. Leaves the mean's state in ``context.memory``.
    """
    hidden = hidden.detach().float()
    token = F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)
    if prefix is None and not pair:
        return token
    context.needs_memory("a mean over the document")
    counted = context.valid if prefix is None else context.valid & (context.offset < prefix)
    past = None if context.memory is None else (context.memory.total, context.memory.count)
    mean, state = causal_mean(hidden, counted, context.document, past, packed=context.packed)
    context.memory = Memory(*state)
    mean = F.rms_norm(mean, mean.shape[-1:], eps=1e-6)
    return mean if prefix is not None else torch.cat([mean, token], dim=-1)


def keep_on_cache(output: Any, context: Context) -> None:
    """Let the cache that a forward returned carry the running mean."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and context.memory is not None:
        remember(cache, context.memory, MEMORY)
