"""Windows score every token once, and what they score is what the model says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headgate.errors import ConfigError, DataError
from headgate.evaluation.perplexity import perplexity, text_perplexity, windows_over

TEXT = "Tom has three apples and Mia has two. " * 30


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_sliding_windows_score_every_token_but_the_first_once(
    tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length - 1))
    windows = windows_over(tokens, length, stride)
    assert [i for _, end, first in windows for i in range(first, end)] == list(range(1, tokens))
    assert all(end - begin <= length and first > begin for begin, end, first in windows)


@given(st.integers(0, 200), st.integers(2, 40))
def test_disjoint_windows_leave_out_their_first_token(tokens: int, length: int) -> None:
    scored = [i for _, end, first in windows_over(tokens, length, length) for i in range(first, end)]
    assert scored == [i for i in range(tokens) if i % length]


@torch.no_grad()
@pytest.mark.parametrize("stride", [8, 16])
def test_text_perplexity_is_the_token_weighted_loss_of_its_windows(
    tiny: tuple[Any, Any], stride: int
) -> None:
    model, tokenizer = tiny
    metrics, items = text_perplexity(
        model, tokenizer, [{"example_id": "a", "text": TEXT}], length=16, stride=stride, batch_size=3
    )
    ids = tokenizer(TEXT)["input_ids"]
    nats, count = 0.0, 0
    for begin, end, first in windows_over(len(ids), 16, stride):
        logits = model(input_ids=torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
        for position in range(first, end):
            nats, count = nats - float(logits[position - begin - 1, ids[position]]), count + 1
    assert metrics["tokens"] == count == items[0]["tokens"]
    assert math.isclose(metrics["loss"], nats / count, rel_tol=1e-4)
    assert math.isclose(metrics["bits_per_byte"] * len(TEXT.encode()) * math.log(2), nats, rel_tol=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize(("length", "stride"), [(64, 64), (64, 16), (200, 200), (256, 128)])
def test_a_whole_files_perplexity_is_an_independent_scripts(
    shared: Any, tmp_path: Any, length: int, stride: int
) -> None:
    """The sliding windows of transformers' documentation, one at a time, over a file as it is."""
    from headgate.data.config import SourceConfig
    from headgate.data.sources import load_rows
    from headgate.models.load import load_model

    model, tokenizer = load_model(str(shared / "models/stories260K"), device="cpu")
    text = "    indented\n\n" + (shared / "data/tinystories/tinystories_sample.txt").read_text()[
        :6000
    ].replace("<|endoftext|>", "")
    (tmp_path / "test.txt").write_text(text)
    rows = load_rows(SourceConfig(source="text", path=str(tmp_path / "test.txt"), split="test"))
    metrics, _ = text_perplexity(model, tokenizer, rows, length=length, stride=stride, batch_size=7)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    nats, count, scored = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        targets = ids[:, begin:end].clone()
        targets[:, : max(scored - begin, 0)] = -100
        with torch.no_grad():
            logits = model(input_ids=ids[:, begin:end]).logits[0, :-1].double()
        wanted = targets[0, 1:]
        kept = wanted != -100
        nats -= float(logits.log_softmax(-1)[kept].gather(-1, wanted[kept, None]).sum())
        count, scored = count + int(kept.sum()), end
        if end == ids.shape[1]:
            break
    assert metrics["tokens"] == count
    assert math.isclose(metrics["loss"], nats / count, rel_tol=1e-6)


def test_masked_rows_count_completions_only_whatever_the_batch(tiny: tuple[Any, Any]) -> None:
    rows = [
        {"example_id": str(i), "prompt": "Tom has " * (i + 1), "completion": "two apples"} for i in range(5)
    ]
    import datasets

    one, _ = perplexity(*tiny, datasets.Dataset.from_list(rows), length=64, batch_size=1)
    all_, items = perplexity(*tiny, datasets.Dataset.from_list(rows), length=64, batch_size=5)
    assert one["tokens"] == all_["tokens"] == sum(item["tokens"] for item in items)
    assert math.isclose(one["loss"], all_["loss"], rel_tol=1e-5)


def test_bad_windows(tiny: tuple[Any, Any]) -> None:
    rows = [{"example_id": "a", "text": TEXT}]
    with pytest.raises(DataError, match="exceeds the model's context"):
        text_perplexity(*tiny, rows, length=100_000, stride=8)
    with pytest.raises(ConfigError, match="leave tokens out"):
        text_perplexity(*tiny, rows, length=8, stride=9)
    with pytest.raises(DataError, match="need rows with a text"):
        text_perplexity(*tiny, [{"example_id": "a", "messages": []}], length=8, stride=4)
