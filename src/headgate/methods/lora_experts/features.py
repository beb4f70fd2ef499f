"""What the router reads, per token: nothing from the future, from padding, from another document, or stale.

    embedding  [rms(mean of e_s, s <= t), rms(e_t)]       mean and token are normalised apart: the mean of t embeddings
    block k    rms(h_t), the input of block k             is smaller by about sqrt(t) and would vanish beside the token
    prepass    rms(h_t), the final hidden state with every adapter off

A BayesRouter reads none of these but token ids: the log evidence of every skill, summed over x_s, s <= t.

With ``granularity: sequence`` mean and evidence stop at the document's first ``prefix_tokens`` tokens, and the mean is all
there is. A cache carries the sum and number of what has been seen, so that decoding equals recomputing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.errors import ModelError
from headgate.methods.context import Context, Memory, remember
from headgate.modules.bayes_router import NOTHING, BayesRouter
from headgate.ops.causal_mean import causal_mean, causal_sum

MEMORY = "headgate_experts"
"""Where a cache keeps the running mean."""


@dataclass
class TextMemory(Memory):
    """``last``: each row's last token, which the next one follows."""

    last: Tensor

    def reordered(self, rows: Tensor) -> TextMemory:
        return TextMemory(self.total[rows], self.count[rows], self.last[rows])


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


def text_evidence(router: BayesRouter, context: Context, vocabulary: int, *, prefix: int | None) -> Tensor:
    """``[B, T, P]`` fp32: how likely each class of a BayesRouter makes the document up to here; see modules/bayes_router.

    ``prefix``: only so many tokens of a document count. Leaves sum, number and last token in ``context.memory``. Raises
    ModelError where the model is given embeddings in place of token ids.
    """
    ids = context.ids
    if ids is None:
        raise ModelError(
            "lora_experts: router: bayes reads token ids, and this forward has inputs_embeds: hand on input_ids, or train with "
            "router: prototype"
        )
    context.needs_memory("the evidence of a document")
    counted = context.valid if prefix is None else context.valid & (context.offset < prefix)
    memory = context.memory if isinstance(context.memory, TextMemory) else None
    ahead = torch.full_like(ids[:, :1], NOTHING) if memory is None else memory.last.unsqueeze(1)
    before = torch.where(context.offset == 0, NOTHING, torch.cat([ahead, ids[:, :-1]], dim=1))
    past = None if memory is None else (memory.total, memory.count)
    step = router.log_probability(ids, before, vocabulary)
    evidence, number = causal_sum(step, counted, context.document, past, packed=context.packed)
    place = torch.arange(ids.shape[1], device=ids.device)
    last = ids.gather(1, torch.where(context.valid, place, 0).amax(1, keepdim=True)).squeeze(1)
    context.memory = TextMemory(evidence[:, -1], number[:, -1], last)
    return evidence


def keep_on_cache(output: object, context: Context) -> None:
    """Let the cache that a forward returned carry the running mean."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and context.memory is not None:
        remember(cache, context.memory, MEMORY)
