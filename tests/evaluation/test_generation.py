"""Neither the batch nor its padding reaches a result; limits, stops and the context's end are honoured and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from headgate.errors import ConfigError, DataError
from headgate.evaluation.generation import GumbelSampling, batches, chat_ids, context_length, generate

PROMPTS = [
    "Tom has 3 apples",
    "A",
    "How many eggs are there in two boxes of twelve eggs each",
    "One two",
    "Six",
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 4}])
def test_results_do_not_depend_on_the_batch(family: str, sampling: dict[str, Any]) -> None:
    from headgate.models.load import load_model

    model, tokenizer = load_model(f"random:{family}", device="cpu")
    one = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=1, **sampling)
    for size in (2, 5):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=size, **sampling) == one


def test_equal_prompts_get_different_samples_and_seeds_repeat(tiny: tuple[Any, Any]) -> None:
    options = dict(max_new_tokens=8, do_sample=True)
    first = generate(*tiny, ["Tom"] * 4, seed=1, **options)
    assert len({result.text for result in first}) == 4
    assert (
        generate(*tiny, ["Tom"] * 4, seed=1, **options)
        == first
        != generate(*tiny, ["Tom"] * 4, seed=2, **options)
    )


def test_gumbel_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    counts = torch.zeros(4)
    sampler = GumbelSampling([7], temperature=1.0, top_p=1.0)
    for _ in range(4000):
        counts[sampler(None, logits).argmax()] += 1  # type: ignore[arg-type]
    wanted = logits.softmax(-1)[0]
    assert (counts / 4000 - wanted).abs().max() < 4 * (wanted * (1 - wanted) / 4000).sqrt().max()


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = [
        torch.isfinite(GumbelSampling([1], 1.0, p)(None, logits))[0].tolist()
        for p in (0.4, 0.5, 0.7, 0.9, 1.0)
    ]  # type: ignore[arg-type]
    assert [sum(row) for row in kept] == [1, 1, 2, 3, 4]


def test_a_continuation_ends_with_the_context_and_is_counted(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    context = context_length(model)
    long, full = [5] * (context - 6), [5] * (context + 40)
    results = generate(model, tokenizer, [long, full, [5, 6]], max_new_tokens=20, batch_size=8)
    assert (results[0].tokens, results[0].truncated, results[0].prompt_truncated) == (6, True, False)
    assert results[1].prompt_truncated and results[1].tokens <= 20
    assert not results[2].prompt_truncated
    alone = [generate(model, tokenizer, [p], max_new_tokens=20)[0] for p in (long, full, [5, 6])]
    assert alone == results


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 8), st.integers(1, 60))
def test_batches_hold_every_prompt_once_and_tight_ones_alone(
    lengths: list[int], size: int, room: int
) -> None:
    found = list(batches(lengths, size, room))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= size
        assert all(lengths[i] <= room for i in batch) or len({lengths[i] for i in batch}) == 1


def test_stop_strings_and_end_tokens_end_the_text(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    (free,) = generate(model, tokenizer, ["Tom has"], max_new_tokens=16)
    word = free.text[len(free.text) // 2 :][:3]
    (stopped,) = generate(model, tokenizer, ["Tom has"], max_new_tokens=16, stop=[word])
    assert stopped.ended and not stopped.truncated
    assert stopped.text == free.text[: free.text.index(word)]


def test_decoding_defaults_of_the_model_are_left_aside(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    kept = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=3.0)
    try:
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == plain
        assert model.generation_config.repetition_penalty == 9.0
    finally:
        model.generation_config = kept


def test_bad_requests(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="prompt 0 is empty"):
        generate(*tiny, [[]])
    with pytest.raises(ConfigError, match="temperature"):
        generate(*tiny, ["a"], do_sample=True, temperature=0.0)
    with pytest.raises(ConfigError, match="top_p"):
        generate(*tiny, ["a"], do_sample=True, top_p=0.0)


def test_chat_template_where_there_is_one(tiny: tuple[Any, Any]) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny[1])
    turns = [{"role": "user", "content": "Hi"}]
    bare = chat_ids(tokenizer, turns)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    assert tokenizer.decode(chat_ids(tokenizer, turns)) == "[user]Hi[assistant]"
    assert chat_ids(tokenizer, turns, raw=True) == bare
