"""A skill is known by its text: evidence is a bigram model written out, and what no skill explains is left to the base."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.errors import ConfigError, ModelError
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.probe import reference_text
from headgate.modules.bayes_router import BASE, FIRST_CONTEXT, NOTHING, SHIFT, BayesRouter

from .conftest import attached, batch_of, logits_of, model_of, stream_stages, trainer_of

TEXTS = {"a": [[5, 6, 7, 5, 6], [9, 5]], "b": [[6, 6, 0, 8]], "c": [[0, 5, 6, 9, 12, 0, 7, 8]]}
VOCABULARY = 40


def joined(texts: list[list[int]]) -> Tensor:
    """One after another, now with one ``NOTHING`` between them, now with several."""
    return torch.tensor(
        [token for number, text in enumerate(texts) for token in text + [NOTHING] * (1 + number)]
    )


def router_of(*owners: str) -> BayesRouter:
    router = BayesRouter(0.1)
    for owner in owners:
        router.learn(owner, joined(TEXTS[owner]), new=True)
    return router


def witten_bell(texts: list[list[int]], text: list[int]) -> list[float]:
    """P of every token after the one before it: counted in Python, interpolated as Witten & Bell (1991) do."""
    tokens = Counter(token for one in texts for token in one)
    pairs = Counter((a, b) for one in texts for a, b in itertools.pairwise(one))
    total, kinds = sum(tokens.values()), 1 + len(tokens)
    out = []
    for place, token in enumerate(text):
        alone = (tokens[token] + kinds / VOCABULARY) / (total + kinds)
        before = text[place - 1]
        after = [count for (a, _), count in pairs.items() if a == before]
        spread = 1 + len(after)
        out.append((pairs[before, token] + spread * alone) / (sum(after) + spread) if place else alone)
    return out


def evidence(router: BayesRouter, text: list[int]) -> Tensor:
    """``[T, P]`` sums over the text so far."""
    ids = torch.tensor([text])
    before = torch.tensor([[NOTHING, *text[:-1]]])
    return router.log_probability(ids, before, VOCABULARY)[0].cumsum(0)


def test_evidence_is_the_bigram_model_written_out() -> None:
    """softmax of it is Bayes' rule with equal priors, at every token."""
    text = [0, 5, 6, 0, 7, 30, 6, 6, 0]
    wanted = torch.tensor([witten_bell(TEXTS[owner], text) for owner in "abc"]).double().log().cumsum(1).T
    z = evidence(router_of(*"abc"), text)
    torch.testing.assert_close(z.softmax(-1), wanted.softmax(-1).float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(z.sum(-1), torch.zeros(len(text)), atol=1e-5, rtol=0)


def test_a_later_skill_changes_no_earlier_ones_evidence_and_one_that_goes_leaves_no_trace() -> None:
    text = [0, 5, 6, 0, 7, 30, 6, 6, 0]
    two, three = router_of("a", "b"), router_of("a", "c", "b")
    difference = evidence(two, text) @ torch.tensor([1.0, -1.0])
    torch.testing.assert_close(difference, evidence(three, text) @ torch.tensor([1.0, 0.0, -1.0]))
    three.remove("c")
    assert three.owners == two.owners
    assert all(torch.equal(one, other) for one, other in zip(three.buffers(), two.buffers(), strict=True))


def test_counts_do_not_depend_on_the_parts_that_a_text_came_in() -> None:
    at_once, by_parts = router_of("a"), BayesRouter(0.1)
    for text in TEXTS["a"]:
        by_parts.learn("a", joined([text]))
    assert by_parts.owners == ["a"]
    assert all(
        torch.equal(one, other) for one, other in zip(at_once.buffers(), by_parts.buffers(), strict=True)
    )


def test_an_expert_has_the_probability_of_all_its_skills_and_one_of_none_stands_at_the_centre() -> None:
    router = router_of(*"abc")
    router.give("c", "a")
    z = evidence(router, [9, 5, 6])[None]
    logits = router(z, ["b", "none", "a"])
    posterior = z.softmax(-1)
    share = logits[..., [0, 2]].softmax(-1)
    torch.testing.assert_close(share, torch.stack([posterior[..., 1], posterior[..., [0, 2]].sum(-1)], -1))
    assert torch.equal(logits[..., 1], torch.zeros(1, 3))
    assert torch.equal(router(z, ["none"]), torch.zeros(1, 3, 1))


@pytest.mark.parametrize("before", [NOTHING, 0, 5, 9, 30])
def test_every_skills_probabilities_sum_to_one_over_the_vocabulary(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one with much text would win where nobody knows anything. Contexts with followers, without, and unheard of."""
    monkeypatch.setattr(
        Tensor, "mean", lambda self, *_, **__: torch.zeros(1)
    )  # the mean over classes, which is taken off
    every = torch.arange(VOCABULARY)[None]
    log = router_of(*"abc").log_probability(every, torch.full_like(every, before), VOCABULARY)
    torch.testing.assert_close(log.exp().sum(1), torch.ones(1, 3))


def test_more_text_of_one_skill_does_not_draw_another_ones_tokens_in_a_large_vocabulary() -> None:
    """Counted in 32,749 hashed buckets, as it was once, 200,000 pairs of 150,000 tokens told nothing apart."""
    vocabulary, stream = 150_000, torch.Generator().manual_seed(0)
    words = [torch.randperm(vocabulary, generator=stream)[:2000] for _ in range(2)]
    router = BayesRouter(0.0)
    for name, own, length in zip("ab", words, (200_000, 4_000), strict=True):
        router.learn(name, own[torch.randint(2000, (length,), generator=stream)], new=True)
    text = words[1][torch.randint(2000, (1, 200), generator=stream)]
    before = torch.cat([torch.tensor([[NOTHING]]), text[:, :-1]], 1)
    posterior = router.log_probability(text, before, vocabulary).cumsum(1).softmax(-1)
    assert float(posterior[..., 1].min()) > 0.99


def test_the_largest_ids_are_counted_as_themselves() -> None:
    router, largest = BayesRouter(0.1), (1 << 31) - 3
    router.learn("a", torch.tensor([largest, 3, largest]))
    router.learn("b", torch.tensor([3, 3, largest - 1]), new=True)
    ids, before = torch.tensor([[largest, 3]]), torch.tensor([[NOTHING, largest]])
    log = router.log_probability(ids, before, largest + 1)
    assert log.isfinite().all() and (log[..., 0] > log[..., 1]).all()


# -- in a model -------------------------------------------------------------------------------------------------
def mixed(*, base: bool = True, top_k: int = 2, **options: Any) -> tuple[Any, LoraExperts]:
    """Three loud experts of one skill each, and the base's own writing."""
    model, anatomy = model_of()
    method = attached(anatomy, experts=3, router="bayes", top_k=top_k, **options)
    router = method.experts.routers.closed_form
    assert isinstance(router, BayesRouter) and BASE in router.owners
    if not base:
        router.remove(BASE)
    return model, method


def gates_of(method: LoraExperts, model: Any, **batch: Tensor) -> Any:
    model.train()
    model(**batch)
    model.eval()
    assert method.routed.running is not None
    (mixture,) = method.routed.running.mixtures.values()
    return mixture


@pytest.mark.parametrize(("top_k", "base_prior"), [(1, 0.1), (2, 0.1), (2, 1.0), (3, 0.5)])
def test_what_the_base_gets_is_missing_from_the_experts_gates(top_k: int, base_prior: float) -> None:
    """g_i = p_i over the chosen and the base; without the base among the classes they sum to one."""
    model, method = mixed(top_k=top_k, base_prior=base_prior)
    batch = batch_of()
    mixture = gates_of(method, model, **batch)
    router, running = method.experts.routers.closed_form, method.routed.running
    assert running is not None and running.phase is not None and isinstance(router, BayesRouter)
    z = running.features.clone()
    z[..., router.owners.index(BASE)] += math.log(base_prior)
    z = z[..., [router.owners.index(name) for name in ("0", "1", "2", BASE)]]
    p = (z / running.phase.temperature).softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, p[..., :3].topk(top_k, -1).indices, 1.0)
    kept[..., 3] = 1
    wanted = p * kept / (p * kept).sum(-1, keepdim=True)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(mixture.gates.weight[valid], wanted[valid][:, :3])
    _, other = mixed(base=False, top_k=top_k)
    if top_k > 1:  # one alone keeps its probability
        sums = gates_of(other, other.routed.anatomy.model, **batch).gates.weight.sum(-1)
        torch.testing.assert_close(sums[valid], torch.ones_like(sums[valid]))


def test_the_bases_own_writing_is_left_to_the_base() -> None:
    """Other samples of the same model: nearly no expert takes part; without the class, somebody must."""
    texts = reference_text(model_of()[0], 11)["input_ids"]
    method_of: dict[bool, float] = {}
    for base in (True, False):
        model, anatomy = model_of()
        method = LoraExperts(experts=2, router="bayes", **({} if base else {"base_prior": 0.0}))
        method.attach(anatomy)
        for number in (0, 1):
            skill = (
                torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(number)) + 400 * number
            )
            batch = {"input_ids": skill, "labels": skill, "attention_mask": torch.ones_like(skill)}
            method.stream.introduce(number, [batch], new=True)
        weight = gates_of(method, model, input_ids=texts).gates.weight.sum(-1)
        method_of[base] = float(weight[:, 16:].mean())
    assert method_of[False] > 0.9 and method_of[True] < 0.1, method_of


def test_embeddings_in_place_of_ids_are_refused_by_name() -> None:
    model, _ = mixed()
    embeds = model.get_input_embeddings()(batch_of()["input_ids"])
    with pytest.raises(ModelError, match=r"router: bayes reads token ids.*hand on input_ids"):
        logits_of(model, inputs_embeds=embeds)


def test_features_that_it_would_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="router: bayes reads token ids alone"):
        LoraExperts(router="bayes", features="prepass")


def test_a_stream_teaches_it_every_skill_once_and_the_base_before_them(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LoraExperts(router="bayes", r=2, new_r=2), stages=stream_stages(2), seed=1)
    trainer.train()
    (method,) = trainer.methods
    assert method.experts.routers.closed_form.owners == [BASE, "0", "1", "2"]
    assert (method.experts.routers.closed_form.counts_PE.sum(-1) > 0).all()


def test_a_new_skill_is_counted_whole_each_document_once_and_no_further_than_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed documents and padded ones are counted as what they are; pairs over a document's end are none."""
    _, anatomy = model_of()
    method = LoraExperts(experts=2, router="bayes", base_prior=0.0)
    method.attach(anatomy)
    router = method.experts.routers.closed_form
    assert isinstance(router, BayesRouter)
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]])
    packed = {"input_ids": ids[:1], "labels": ids[:1], "segment_ids": torch.tensor([[0, 0, 1, 1]])}
    padded = {"input_ids": ids[1:], "labels": ids[1:], "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    method.stream.introduce(0, [packed, padded], new=True)
    wanted = BayesRouter(0.0)
    wanted.learn("0", joined([[5, 6], [7, 8], [9, 5]]), new=True)
    assert all(torch.equal(one, other) for one, other in zip(router.buffers(), wanted.buffers(), strict=True))

    monkeypatch.setattr("headgate.methods.lora_experts.stream.TEXT_TOKENS", 6)
    read: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for number in range(9):
            read.append(number)
            yield packed

    method.stream.introduce(1, batches(), new=True)
    assert read == [0, 1], "four tokens a batch: the second reaches six"
    assert float(router.counts_PE[1][router.events_PE[1] < FIRST_CONTEXT * SHIFT].sum()) == 6, (
        "and is cut there"
    )
    smaller = [{name: value[:, half : half + 2] for name, value in packed.items()} for half in (0, 2)] * 2
    method.stream.introduce(0, smaller, new=True)
    assert torch.equal(router.events_PE[2], router.events_PE[1]), "as ranks read it, in smaller batches"
