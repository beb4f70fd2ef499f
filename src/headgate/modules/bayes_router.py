"""BayesRouter: whose text is this so far? A bigram model of every skill answers, in closed form.

    z_p(t) = sum over s <= t of log P_p(x_s | x_(s-1))               within the document of t
    P_p(b | a) = (c_p(a, b) + d_p(a) P_p(b)) / (c_p(a) + d_p(a))      d_p(a): 1 + how many distinct tokens followed a
    P_p(b) = (c_p(b) + d_p / M) / (n_p + d_p)                         d_p: how many distinct tokens there were, of n_p
    z_i = log sum exp z_p over the skills p that expert i serves

softmax(z) is the posterior over skills, whose priors are equal (naive Bayes over a language model of each class: Peng,
Schuurmans & Wang 2004, "Augmenting Naive Bayes Classifiers with Statistical Language Models", section 3), smoothed as
Witten & Bell (1991), which has no parameter. A linear rule on mean embeddings (PrototypeRouter) is as good in a long text;
in the first sentence this one is surer, and that is where one skill's tokens reach another's expert.

One more class may be the base's own writing, which no expert serves: what reads like it is left to the base. With a prior well
below a skill's the first words of a document, when nothing is clear, go to the experts, who were trained for some of it.

Counts of one skill are no other's, so no later skill changes an earlier one's evidence. Tokens and pairs are counted in M
hashed buckets: 3 M numbers a skill, whatever the vocabulary and the model's width.

Legend: B batch, T tokens, N experts asked for, P skills (the base's own writing among them), M buckets, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headgate.modules.closed_form_router import ClosedFormRouter

BUCKETS = 32_749
"""M: the largest prime below 2^15, so that the remainder is a hash."""
PAIR = 1_000_003
NOTHING = -1
"""Stands before a document's first token, and for padding."""
BASE = "base"
"""Owner of the base's own writing. Experts are called by their numbers."""


class BayesRouter(ClosedFormRouter):
    """Reads evidence ``[B, T, P]`` in place of features.

    Buffers, fp32: ``tokens_MP`` c_p(b), ``pairs_MP`` c_p(a, b), ``followers_MP`` how many distinct tokens followed a;
    ``total_P`` n_p, ``distinct_P`` d_p.

    Args:
        base_prior: of the base's own writing, where every skill has 1; 0: there is no such class.

    Equation: lora_experts (Bayes router): z_p(t) = sum over s <= t of log P_p(x_s | x_(s-1)), Witten-Bell smoothed
    Proved by: tests/lora_experts/test_bayes_router.py::test_evidence_is_the_bigram_model_written_out
    """

    skill_dim = -1
    tokens_MP: Tensor
    pairs_MP: Tensor
    followers_MP: Tensor
    total_P: Tensor
    distinct_P: Tensor

    def __init__(self, base_prior: float) -> None:
        self.base_prior = base_prior
        super().__init__()

    def shapes(self, skills: int) -> dict[str, tuple[int, ...]]:
        counts = dict.fromkeys(("tokens_MP", "pairs_MP", "followers_MP"), (BUCKETS, skills))
        return {**counts, "total_P": (skills,), "distinct_P": (skills,)}

    @torch.no_grad()
    def learn(self, name: str, documents_DT: Tensor, /, *, new: bool = False) -> None:
        """Count the token ids of documents (``NOTHING`` pads them) of an expert's latest skill, or of a new one."""
        place = self.place_of(name, new=new)
        documents_DT = documents_DT.to(self.total_P.device)
        ids, before, after = documents_DT[documents_DT >= 0], documents_DT[:, :-1], documents_DT[:, 1:]
        before, after = before[after >= 0], after[after >= 0]
        tokens_M, pairs_M, followers_M = (
            counts[:, place] for counts in (self.tokens_MP, self.pairs_MP, self.followers_MP)
        )
        tokens_M += torch.bincount(ids % BUCKETS, minlength=BUCKETS)
        buckets, first = _distinct(_pair(before, after))
        unseen = pairs_M[buckets] == 0
        followers_M += torch.bincount(before[first[unseen]] % BUCKETS, minlength=BUCKETS)
        pairs_M += torch.bincount(_pair(before, after), minlength=BUCKETS)
        self.total_P[place], self.distinct_P[place] = tokens_M.sum(), (tokens_M > 0).sum()

    # -- evidence ---------------------------------------------------------------------------------------
    def log_probability(self, ids_BT: Tensor, before_BT: Tensor) -> Tensor:
        """``[B, T, P]``: log P_p of every token after the one before it (``NOTHING``: alone), less its mean over classes.

        The mean drops out of every posterior; with it the evidence of a long text would lose its last digits in fp32.
        """
        follows_BT1 = (before_BT >= 0).unsqueeze(-1)
        before_BT = before_BT.clamp_min(0)
        prior_P = self.distinct_P / BUCKETS
        alone_BTP = (self.tokens_MP[ids_BT % BUCKETS] + prior_P) / (self.total_P + self.distinct_P)
        spread_BTP = self.followers_MP[before_BT % BUCKETS] + 1
        after_BTP = self.pairs_MP[_pair(before_BT, ids_BT)] + spread_BTP * alone_BTP
        after_BTP = after_BTP / (self.tokens_MP[before_BT % BUCKETS] + spread_BTP)
        log_BTP = torch.where(follows_BT1, after_BTP, alone_BTP).log()
        return log_BTP - log_BTP.mean(-1, keepdim=True)

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


def _pair(before: Tensor, after: Tensor) -> Tensor:
    """The bucket of a pair of tokens."""
    return (before * PAIR + after) % BUCKETS


def _distinct(buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Every bucket once, and a place where it stands."""
    buckets, order = buckets.sort(stable=True)
    starts = torch.ones_like(buckets, dtype=torch.bool)
    starts[1:] = buckets[1:] != buckets[:-1]
    return buckets[starts], order[starts]
