"""Lossless depth: the routed model drafts, the same weights at full depth decide, in one cache.

    accept x_i while x_i = argmax p_i                                     greedy: what full depth alone would print
    accept x_i with probability min(1, p_i(x_i) / q_i(x_i)), else draw from (p_i - q_i)+ / sum (p_i - q_i)+        sampling
    k = argmax (1 - a^(k+1)) / (1 - a) / (1 + k (c + o))                  a: acceptance so far, c: depth of a draft, o: OVERHEAD

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1 and theorem 3.8, with the
draft model of "LayerSkip" (Elhoushi et al. 2024): the model itself, some blocks left out. After a draft the cache is cut
back and the drafted tokens pass through every block, so what it holds is always full depth's. What a decision is equal
to is a forward over several tokens; where two tokens' logits differ by less than its rounding, either may win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headgate.errors import ModelError
from headgate.methods.context import MEMORY

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from headgate.methods.layer_routing.forward import RoutedForward

LONGEST = 12
OVERHEAD = 0.15
"""Of a drafted token, in full forwards: the head, its place in the verification, the loop. A constant and not a clock, so
that the same seed draws the same text."""
PATIENCE = 16
"""Rounds without a draft after which one is tried again."""
OBSERVED = "observed"
"""Routes are decided and carried along; every block runs."""


@dataclass
class Drafting:
    """How drafts fare. ``acceptance`` is a running mean that starts hopeful; ``cost``: of a draft, in full forwards."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    acceptance: float = 0.8
    cost: float = 0.5
    idle: int = 0

    def length(self) -> int:
        """Tokens to draft next: what gives most tokens a cost; 0 where plain decoding is as fast."""
        a, best, speed = min(self.acceptance, 0.999), 0, 1.0
        for k in range(1, LONGEST + 1):
            gained = (1 - a ** (k + 1)) / (1 - a) / (1 + k * (self.cost + OVERHEAD))
            if gained > speed:
                best, speed = k, gained
        if best == 0:
            self.idle += 1
            if self.idle >= PATIENCE:
                self.idle, best = 0, 1
        return best

    def count(self, drafted: int, accepted: int, cost: float) -> None:
        self.rounds += 1
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        judged = min(accepted + 1, drafted)  # what follows a refused token was not judged
        for place in range(judged):
            self.acceptance += 0.1 * (float(place < accepted) - self.acceptance)
        if drafted:
            self.cost += 0.2 * (cost - self.cost)


def check_lossless(routing: RoutedForward | None) -> RoutedForward:
    """The routed forward itself. Raises ModelError for one that cannot draft into a full-depth cache."""
    if routing is None or routing.config.policy == "dense":
        raise ModelError("lossless decoding drafts with layer_routing: this model routes no blocks")
    for key, able in (("kv", ("full", "reuse")), ("features", ("block", "embedding"))):
        if getattr(routing.config, key) not in able:
            raise ModelError(
                f"lossless decoding cuts the cache back, which {key}: {getattr(routing.config, key)} cannot follow: "
                "generate without it"
            )
    return routing


@torch.no_grad()
def lossless_decoding(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: Callable[[Tensor, Tensor | None], Tensor],
    generation_config: GenerationConfig,
    *,
    routing: RoutedForward | None,
    drafting: Drafting | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """A decoding method for ``generate(custom_generate=...)``: ``[1, T]`` -> ``[1, T + new]``.

    ``routing``: the routed forward inside ``model`` (layer_routing). ``drafting``: filled with what drafts cost and
    gained. Raises ModelError for several rows, a cache that cannot be cut, or a routing that cannot draft.
    """
    routed = check_lossless(routing)
    if input_ids.shape[0] != 1:
        raise ModelError(
            f"lossless decoding takes one prompt at a time, got {input_ids.shape[0]}: loop over them"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is None or getattr(cache, "is_compileable", False):
        raise ModelError(
            "lossless decoding needs a dynamic cache: leave cache_implementation and use_cache out"
        )
    drafting = Drafting() if drafting is None else drafting
    session = Session(model, routed, cache, model_kwargs.get("attention_mask"), logits_processor)
    before, ids = routed.routing, input_ids
    try:
        if ids.shape[1] > 1:
            session.forward(ids[:, :-1], 0, OBSERVED, last=True)
        while True:
            room = int(generation_config.max_length) - ids.shape[1] - 1
            tokens, scores = session.draft(ids, min(drafting.length(), room), generation_config)
            verified = session.verify(ids, tokens)
            kept, follows = judge(tokens, scores, verified, sample=bool(generation_config.do_sample))
            drafting.count(len(tokens), kept, session.cost)
            session.cut(ids.shape[1] + kept)
            for token in [*tokens[:kept], follows]:
                ids = torch.cat([ids, token.view(1, 1)], 1)
                if streamer is not None:
                    streamer.put(token.view(1).cpu())
                if bool(stopping_criteria(ids, None).all()):
                    return ids
    finally:
        routed.routing = before
        if streamer is not None:
            streamer.end()


class Session:
    """One prompt's cache, read and written at either depth. It always holds all tokens but the last, at full depth."""

    def __init__(
        self,
        model: nn.Module,
        routing: RoutedForward,
        cache: Cache,
        mask: Tensor | None,
        processor: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.model, self.routing, self.cache, self.processor = model, routing, cache, processor
        self.mask, self.cost = mask, 1.0
        if hasattr(cache, "activate_past_recording"):  # a sliding window must be able to go back
            cache.activate_past_recording()

    def forward(self, ids: Tensor, past: int, depth: str, *, last: bool = False) -> Tensor:
        """Logits ``[T, V]`` in fp32 (of the ``last`` token alone: ``[1, V]``), the cache grown by ``ids``."""
        self.routing.routing = depth
        end = past + ids.shape[1]
        mask = torch.ones(1, end, dtype=torch.long, device=ids.device)
        if self.mask is not None:
            mask[:, : min(end, self.mask.shape[1])] = self.mask[:, :end]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1 if last else 0,
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.cache.crop(length - int(self.cache.get_seq_length()))

    def draft(self, ids: Tensor, count: int, config: GenerationConfig) -> tuple[list[Tensor], list[Tensor]]:
        """Up to ``count`` tokens of the routed model and the scores ``[V]`` that each was taken by; the cache as before."""
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        length, memory, opened = ids.shape[1], getattr(self.cache, MEMORY, None), 0.0
        ends = config.eos_token_id if config.eos_token_id is not None else []
        ends = set(torch.as_tensor(ends).flatten().tolist())
        while len(tokens) < count and not (tokens and int(tokens[-1]) in ends):
            logits = self.forward(ids[:, -1:], ids.shape[1] - 1, "on")
            scores.append(self.processor(ids, logits)[0])
            token = chosen(scores[-1], sample=bool(config.do_sample))
            tokens.append(token)
            ids = torch.cat([ids, token.view(1, 1)], 1)
            opened += self._depth()
        self.cost = opened / len(tokens) if tokens else self.cost
        self.cut(length - 1)
        if memory is not None:  # a draft that is refused leaves no trace in what routes are decided by
            setattr(self.cache, MEMORY, memory)
        return tokens, scores

    def verify(self, ids: Tensor, tokens: list[Tensor]) -> Tensor:
        """Scores ``[k + 1, V]`` of full depth for every drafted token, and for the one after them."""
        length, whole = ids.shape[1], torch.cat([ids, *(token.view(1, 1) for token in tokens)], 1)
        logits = self.forward(whole[:, length - 1 :], length - 1, OBSERVED)
        rows = [self.processor(whole[:, : length + i], logits[i : i + 1]) for i in range(len(logits))]
        return torch.cat(rows)

    def _depth(self) -> float:
        """Share of all blocks that the last token ran."""
        route, anatomy = self.routing.now.route, self.routing.anatomy
        assert route is not None and anatomy is not None
        units = self.routing.config.gates_per_block
        closed = float((route.weight[0, -1] == 0).sum()) / units
        return 1 - closed / len(anatomy.blocks)


def chosen(scores: Tensor, *, sample: bool) -> Tensor:
    """A token ``[]`` from scores ``[V]``."""
    return torch.multinomial(scores.softmax(-1), 1)[0] if sample else scores.argmax(-1)


def judge(
    tokens: list[Tensor], drafted: list[Tensor], verified: Tensor, *, sample: bool
) -> tuple[int, Tensor]:
    """How many drafted tokens full depth keeps, and the token that follows them.

    ``drafted``: scores ``[V]`` that each token was taken by; ``verified`` ``[k + 1, V]``: full depth's.
    """
    if not sample:
        best = verified.argmax(-1)
        kept = 0
        while kept < len(tokens) and int(tokens[kept]) == int(best[kept]):
            kept += 1
        return kept, best[kept]
    p = verified.softmax(-1)
    for place, (token, scores) in enumerate(zip(tokens, drafted, strict=True)):
        q = scores.softmax(-1)
        if float(torch.rand((), device=p.device)) * float(q[token]) >= float(p[place, token]):
            left = (p[place] - q).clamp(min=0)
            left = left if float(left.sum()) > 0 else p[place]  # p = q up to rounding
            return place, torch.multinomial(left, 1)[0]
    return len(tokens), torch.multinomial(p[len(tokens)], 1)[0]
