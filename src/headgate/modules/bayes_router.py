"""BayesRouter: whose text is this so far? A bigram model of every skill answers, in closed form.

    z_p(t) = sum over s <= t of log P_p(x_s | x_(s-1))               within the document of t
    P_p(b | a) = (c_p(a, b) + d_p(a) P_p(b)) / (c_p(a) + d_p(a))      c_p(a, b): how often b followed a
    P_p(b)     = (c_p(b) + d_p / V) / (n_p + d_p)                     c_p(b): how often b stood there, of n_p tokens
    z_i = log sum exp z_p over the skills p that expert i serves

c_p(a) is how often anything followed a, d_p(a) one more than how many different tokens did, d_p one more than how many there
were, V the size of the vocabulary: every P sums to 1 over it.

softmax(z) is the posterior over skills, whose priors are equal (naive Bayes over a language model of each class: Peng,
Schuurmans & Wang 2004, "Augmenting Naive Bayes Classifiers with Statistical Language Models", section 3), smoothed as
Witten & Bell (1991), which has no parameter. A linear rule on mean embeddings (PrototypeRouter) is as good in a long text;
in the first sentence this one is surer, and that is where one skill's tokens reach another's expert.

One more class may be the base's own writing, which no expert serves: what reads like it is left to the base. With a prior well
below a skill's the first words of a document, when nothing is clear, go to the experts, who were trained for some of it.

Counts of one skill are no other's, so no later skill changes an earlier one's evidence. They are exact for every
vocabulary: hashed into buckets, pairs of a large one collide, and whoever has more text gets what is nobody's.

Legend: B batch, T tokens, N experts asked for, P skills (the base's own writing among them), E events, C contexts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.modules.closed_form_router import ClosedFormRouter
from headgate.modules.structure import Structure

NOTHING = -1
"""Stands before a document's first token, and between documents."""
ANYWHERE, FIRST_CONTEXT = 1, 2
"""Context of a token wherever it stands; that of token a is a + FIRST_CONTEXT. 0 is room that nothing fills yet."""
SHIFT = 1 << 31
"""An event is context * SHIFT + token."""
BASE = "base"
"""Owner of the base's own writing. Experts are called by their numbers."""


class BayesRouter(ClosedFormRouter):
    """Reads evidence ``[B, T, P]`` in place of features.

    Buffers: ``events_PE`` int64, of every skill the events that occurred, ascending, and ``counts_PE`` fp32, how often.
    What follows from them: ``contexts_PC`` int64, ascending, ``totals_PC`` c_p(a) and ``kinds_PC`` d_p(a) - 1. Rows are as long as
    the longest, filled up with 0 in front: some twelve bytes for every different pair of tokens.

    Args:
        base_prior: of the base's own writing, where every skill has 1; 0: there is no such class.

    Equation: lora_experts (Bayes router): z_p(t) = sum over s <= t of log P_p(x_s | x_(s-1)), Witten-Bell smoothed
    Proved by: tests/lora_experts/test_bayes_router.py::test_evidence_is_the_bigram_model_written_out
    """

    events_PE: Tensor
    counts_PE: Tensor
    contexts_PC: Tensor
    totals_PC: Tensor
    kinds_PC: Tensor

    def __init__(self, base_prior: float) -> None:
        self.base_prior, self.events, self.contexts = base_prior, 1, 1
        super().__init__()

    def zeros(self, skills: int) -> dict[str, Tensor]:
        events, contexts = (skills, self.events), (skills, self.contexts)
        return {
            "events_PE": torch.zeros(events, dtype=torch.long),
            "counts_PE": torch.zeros(events),
            "contexts_PC": torch.zeros(contexts, dtype=torch.long),
            "totals_PC": torch.zeros(contexts),
            "kinds_PC": torch.zeros(contexts),
        }

    @torch.no_grad()
    def learn(self, name: str, text_T: Tensor, /, *, new: bool = False) -> None:
        """Count token ids, documents one after another with ``NOTHING`` between them, of an expert's latest skill or a new one."""
        place = self.place_of(name, new=new)
        text_T = text_T.to(self.events_PE.device)
        after, follows = text_T[1:], (text_T[1:] >= 0) & (text_T[:-1] >= 0)
        events = torch.cat(
            [
                ANYWHERE * SHIFT + text_T[text_T >= 0],
                (text_T[:-1][follows] + FIRST_CONTEXT) * SHIFT + after[follows],
            ]
        )
        known = self.events_PE[place] > 0
        events, which = torch.cat([self.events_PE[place][known], events]).unique(return_inverse=True)
        once = self.counts_PE.new_ones(len(which) - int(known.sum()))
        counts = _sums(which, torch.cat([self.counts_PE[place][known], once]), len(events))
        contexts, which = (events // SHIFT).unique(return_inverse=True)
        totals, kinds = (_sums(which, values, len(contexts)) for values in (counts, torch.ones_like(counts)))
        rows = {
            "events_PE": events,
            "counts_PE": counts,
            "contexts_PC": contexts,
            "totals_PC": totals,
            "kinds_PC": kinds,
        }
        for buffer, row in rows.items():
            table = getattr(self, buffer)
            width = max(table.shape[1], 1 + len(row))
            table = F.pad(table, (width - table.shape[1], 0))
            table[place] = F.pad(row, (width - len(row), 0))
            setattr(self, buffer, table)
        self.events, self.contexts = self.events_PE.shape[1], self.contexts_PC.shape[1]

    def changed(self) -> None:
        """Rows become as long as the longest that is left needs, and the 0 in front of it."""
        for buffer, table in list(self.named_buffers()):
            keys = self.events_PE if buffer in ("events_PE", "counts_PE") else self.contexts_PC
            longest = int((keys > 0).sum(1).max()) if len(keys) else 0
            setattr(self, buffer, table[:, table.shape[1] - 1 - longest :].contiguous())
        self.events, self.contexts = self.events_PE.shape[1], self.contexts_PC.shape[1]

    def structure(self) -> Structure:
        return {**super().structure(), "events": self.events, "contexts": self.contexts}

    def restore(self, structure: Structure) -> None:
        self.events, self.contexts = structure["events"], structure["contexts"]
        super().restore(structure)

    # -- evidence ---------------------------------------------------------------------------------------
    def log_probability(self, ids_BT: Tensor, before_BT: Tensor, vocabulary: int) -> Tensor:
        """``[B, T, P]``: log P_p of every token after the one before it (``NOTHING``: alone), less its mean over classes.

        The mean drops out of every posterior; with it the evidence of a long text would lose its last digits in fp32.
        """
        anywhere_BT = torch.full_like(ids_BT, ANYWHERE)
        uniform = self.counts_PE.new_tensor(1 / vocabulary)
        alone_PBT = self._interpolated(anywhere_BT, ids_BT, uniform)
        after_PBT = self._interpolated(before_BT + FIRST_CONTEXT, ids_BT, alone_PBT)
        log_BTP = torch.where(before_BT >= 0, after_PBT, alone_PBT).log().movedim(0, -1)
        return log_BTP - log_BTP.mean(-1, keepdim=True)

    def _interpolated(self, context_BT: Tensor, ids_BT: Tensor, shorter: Tensor) -> Tensor:
        """``[P, B, T]``: P_p of a token in its context, from what a ``shorter`` context says."""
        seen_PBT = _found(self.events_PE, context_BT * SHIFT + ids_BT, self.counts_PE)
        total_PBT, kinds_PBT = _found(self.contexts_PC, context_BT, self.totals_PC, self.kinds_PC)
        spread_PBT = kinds_PBT + 1
        return (seen_PBT[0] + spread_PBT * shorter) / (total_PBT + spread_PBT)

    def forward(self, evidence_BTP: Tensor, names: Sequence[str]) -> Tensor:
        """``[B, T, N]`` fp32 logits of experts; of ``BASE`` too, with its prior, where it is asked for."""
        skills, experts = self.served(names, evidence_BTP.device)
        own_BTS = evidence_BTP.index_select(-1, skills)
        experts_BTS = experts.expand_as(own_BTS)
        z_BTN = evidence_BTP.new_full((*evidence_BTP.shape[:-1], len(names)), -torch.inf)
        top_BTN = z_BTN.scatter_reduce(-1, experts_BTS, own_BTS, "amax")
        share_BTS = (own_BTS - top_BTN.gather(-1, experts_BTS)).exp()
        sum_BTN = torch.zeros_like(top_BTN).scatter_add(-1, experts_BTS, share_BTS)
        z_BTN = (top_BTN + sum_BTN.log()).masked_fill(top_BTN == -torch.inf, 0.0)
        if BASE in names:
            z_BTN[..., names.index(BASE)] += math.log(self.base_prior)
        return z_BTN


def _sums(which: Tensor, values: Tensor, count: int) -> Tensor:
    """``[count]`` sums of values by the place that each belongs to: whole numbers, so in any order the same."""
    return values.new_zeros(count).index_add_(0, which, values)


def _found(keys_PK: Tensor, wanted_BT: Tensor, *values_PK: Tensor) -> Tensor:
    """``[len(values), P, B, T]``: what stands beside each skill's key, 0 where it has no such key.

    Ascending rows whose first key is below every one that is asked for, so the last key that is no larger always exists.
    """
    wanted = wanted_BT.flatten().expand(len(keys_PK), -1).contiguous()
    place = torch.searchsorted(keys_PK, wanted, right=True) - 1
    there = keys_PK.gather(1, place) == wanted
    found = torch.stack([values.gather(1, place) * there for values in values_PK])
    return found.view(len(values_PK), len(keys_PK), *wanted_BT.shape)
