"""Every way of generating gives what one token after the other gives, live and exported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, pipeline

from headgate.experiments.served import load_written

from ..layer_routing.conftest import batch_of
from .conftest import exported, routed, with_experts

GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def kinds(kind: str, family: str) -> tuple[Any, Any, Any]:
    if kind == "experts":
        return with_experts(family)
    if kind == "prepass":
        return routed(family, features="prepass")
    return routed(family, granularity=kind, prefix_tokens=4)


@torch.no_grad()
def by_recomputing(model: Any, batch: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """Greedy decoding without any cache: the definition that every cache must meet."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("kind", ["token", "sample", "experts", "prepass"])
def test_caches_of_either_kind(family: str, kind: str, tmp_path: Path) -> None:
    """Dynamic, static and (Gemma 3) sliding caches, left padding, a batch; live and exported."""
    model, tokenizer, _ = kinds(kind, family)
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    batch = batch_of(left=True)
    wanted = by_recomputing(model, batch, 14)
    for one in (model, again):
        for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(one.generate(**batch, **GREEDY, **cache), wanted), cache


@pytest.mark.parametrize("kind", ["token", "sample", "experts"])
def test_a_static_cache_without_padding(kind: str) -> None:
    """transformers hands a prompt without padding no mask, whatever room the cache has left behind it."""
    model, _, _ = kinds(kind, "llama")
    batch = batch_of(rows=2, padded=False)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    wanted = by_recomputing(model, batch, 14)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, **GREEDY, **cache), wanted), cache


def test_a_text_longer_than_the_window(tmp_path: Path) -> None:
    model, tokenizer, _ = routed("gemma3")
    window = 6
    for config in (model.config, model.get_base_model().config):
        config.sliding_window = window
    for module in model.modules():
        if hasattr(module, "sliding_window") and module.sliding_window is not None:
            module.sliding_window = window
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    assert again.config.text_config.sliding_window == window
    batch = batch_of(rows=2, length=12, left=True)
    wanted = by_recomputing(model, batch, 14)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(again.generate(**batch, **GREEDY, **cache), wanted), cache


@pytest.mark.parametrize("kind", ["token", "sample", "experts"])
def test_beams_and_samples_are_those_of_the_live_run(kind: str, tmp_path: Path) -> None:
    model, tokenizer, _ = kinds(kind, "llama")
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    batch = batch_of(left=True)
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "temperature": 0.8}):
        found = []
        for one in (model, again):
            torch.manual_seed(0)
            found.append(one.generate(**batch, **{**GREEDY, **options}))
        assert torch.equal(*found), options


def test_a_pipeline(tmp_path: Path) -> None:
    model, tokenizer, _ = routed()
    folder = exported(model, tokenizer, tmp_path / "out")
    ask = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    text = "Tom has three apples."
    (said,) = ask(text, max_new_tokens=10, do_sample=False, return_full_text=False)
    ids = tokenizer(text, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert said["generated_text"] == tokenizer.decode(
        new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
    )


@pytest.mark.parametrize("kind", ["token", "static", "experts"])
def test_continuous_batching(kind: str, tmp_path: Path) -> None:
    """Several requests of different lengths in one paged cache: each gets what it would get alone."""
    if kind == "static":
        model, tokenizer, _ = routed(policy="static", granularity="auto", skip=[1, 2])
    elif kind == "experts":
        model, tokenizer, _ = with_experts(features="block 1")
    else:
        model, tokenizer, _ = routed()
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [31, 32, 33, 34, 35]]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = again.generate_batch(prompts, generation_config=config, progress_bar=False)
    for prompt, output in zip(prompts, found.values(), strict=True):
        alone = again.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()


def test_continuous_batching_refuses_what_it_cannot_carry(tmp_path: Path) -> None:
    from headgate.methods.context import Context

    call = {
        "input_ids": torch.tensor([[3, 4, 5]]),
        "position_ids": torch.tensor([[0, 1, 7]]),
        "cu_seq_lens_q": torch.tensor([0, 2, 3]),
        "cache": object(),
    }
    context = Context.read(call)
    assert context.document.tolist() == [[0, 0, 1]] and context.paged
    with pytest.raises(ValueError, match="a route per document keeps something beside the cache"):
        context.needs_memory("a route per document")
    Context.read({**call, "position_ids": torch.tensor([[0, 1, 0]])}).needs_memory("a fresh request")


LOSSLESS = [
    {},
    {"granularity": "sample", "prefix_tokens": 4},
    {"policy": "static", "granularity": "auto", "skip": [2]},
]


@pytest.mark.parametrize("options", LOSSLESS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lossless_depth_says_what_full_depth_says(
    options: dict[str, Any], family: str, tmp_path: Path
) -> None:
    from headgate.serving.lossless import Drafting

    model, tokenizer, method = routed(family, **options)
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    again.set_routing("removed")
    prompts = [
        torch.randint(3, 1000, (1, n), generator=torch.Generator().manual_seed(n)) for n in (1, 2, 5, 9)
    ]
    wanted = [again.generate(ids, **{**GREEDY, "max_new_tokens": 24}) for ids in prompts]
    again.set_routing("on")
    drafting = Drafting()
    for ids, full in zip(prompts, wanted, strict=True):
        found = again.generate(
            ids, **{**GREEDY, "max_new_tokens": 24}, custom_generate=again.lossless, drafting=drafting
        )
        assert torch.equal(found, full)
    assert drafting.drafted > 0 and drafting.rounds < 4 * 24 + drafting.drafted
    assert again.methods["layer_routing"].forward_pass.routing == "on", "routing is as it was"
    from headgate.serving.lossless import lossless_decoding

    live = model.generate(
        prompts[-1], **{**GREEDY, "max_new_tokens": 24},
        custom_generate=partial(lossless_decoding, routing=method.execution),
    )  # fmt: skip
    assert torch.equal(live, wanted[-1])


@pytest.mark.slow
def test_two_hundred_prompts_are_full_depths() -> None:
    """Drafts by token, kept and refused in every mixture; one differing token would fail."""
    from headgate.serving.lossless import Drafting, lossless_decoding

    model, _, method = routed()
    options = {**GREEDY, "max_new_tokens": 12}
    stream, drafting = torch.Generator().manual_seed(11), Drafting()
    for number in range(200):
        ids = torch.randint(3, 1000, (1, 1 + number % 12), generator=stream)
        method.set_routing("removed")
        full = model.generate(ids, **options)
        method.set_routing("on")
        decode = partial(lossless_decoding, routing=method.execution, drafting=drafting)
        assert torch.equal(model.generate(ids, **options, custom_generate=decode), full), number
        drafting.acceptance = max(drafting.acceptance, 0.8)  # keep drafting, however it fares
    assert 0 < drafting.accepted < drafting.drafted, "both ends are tried"


def test_sampled_texts_of_the_whole_loop_have_full_depths_distribution() -> None:
    """Two tokens over a vocabulary of four: all sixteen texts, against their exact probabilities at full depth."""
    from scipy.stats import chisquare
    from transformers import AutoConfig, AutoModelForCausalLM

    from headgate.methods.layer_routing import LayerRouting
    from headgate.models.anatomy import describe
    from headgate.serving.lossless import Drafting, lossless_decoding

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama", vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.6,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.tensor([[1, 2, 3]])
    method = LayerRouting(policy="static", skip=[1], keep=1)
    method.attach(describe(model))
    method.eval()

    @torch.no_grad()
    def joint(routing: str) -> torch.Tensor:
        method.set_routing(routing)
        first = model(prompt).logits[0, -1].softmax(-1)
        texts = torch.cat([prompt.expand(4, -1), torch.arange(4).unsqueeze(1)], 1)
        return first.unsqueeze(1) * model(texts).logits[:, -1].softmax(-1)

    full, drafted = joint("removed"), joint("on")
    draws, counts, drafting = 1500, torch.zeros(4, 4), Drafting(cost=0.1)
    assert chisquare(drafted.flatten() * draws, full.flatten() * draws).pvalue < 1e-6, (
        "the draft is another model"
    )
    for _ in range(draws):
        out = model.generate(
            prompt, max_new_tokens=2, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None,
            custom_generate=partial(lossless_decoding, routing=method.execution, drafting=drafting),
        )  # fmt: skip
        counts[out[0, -2], out[0, -1]] += 1
        drafting.acceptance, drafting.cost = 0.8, 0.1  # keep drafting, however it fares
    assert drafting.drafted >= draws, "a draft in every text"
    assert chisquare(counts.flatten(), full.flatten() * draws).pvalue > 0.001


def test_lossless_sampling_keeps_the_distribution() -> None:
    """Draft and target differ widely; what comes out is the target's, by a chi-squared test on a vocabulary of five."""
    from scipy.stats import chisquare

    from headgate.serving.lossless import judge

    torch.manual_seed(0)
    p, q = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]), torch.tensor([0.5, 0.05, 0.3, 0.1, 0.05])
    counts, draws = torch.zeros(5), 6000
    for _ in range(draws):
        token = torch.multinomial(q, 1)[0]
        kept, follows = judge([token], [q.log()], torch.stack([p.log(), p.log()]), sample=True)
        counts[int(token) if kept else int(follows)] += 1
    assert chisquare(counts, p * draws).pvalue > 0.001
    assert chisquare(counts, q * draws).pvalue < 1e-6, "the draft's own distribution would be seen"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "exit", "kv": "drop"}, "kv: drop cannot follow"),
        ({"features": "prepass"}, "prepass cannot follow"),
    ],
)
def test_what_cannot_draft_is_refused(options: dict[str, Any], message: str) -> None:
    from headgate.serving.lossless import lossless_decoding

    model, _, method = routed(**options)
    with pytest.raises(ValueError, match=message):
        model.generate(
            torch.tensor([[3, 4, 5]]),
            **GREEDY,
            custom_generate=partial(lossless_decoding, routing=method.execution),
        )


def test_drafts_grow_where_they_are_kept_and_stop_where_they_are_not() -> None:
    from headgate.serving.lossless import PATIENCE, Drafting

    good, bad = Drafting(), Drafting()
    for _ in range(60):
        good.count(4, 4, 0.2)
        bad.count(4, 0, 0.9)
    assert good.length() > 4
    lengths = [bad.length() for _ in range(2 * PATIENCE)]
    assert sum(lengths) <= 2 and 0 in lengths, "only a try now and then"
