"""Mixtures: shares exact in expectation, an order that is a function of (seed, epoch), one resumed as it was."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.data import DataConfig, load_data, prepare
from headgate.data.mixing import Mixture

MIX = Mixture([3.0, 1.0, 1.0], [500, 40, 300])


@pytest.mark.parametrize("lengths", [None, [i % 97 for i in range(840)]])
def test_sources_are_drawn_by_their_shares(lengths):
    counts = Counter()
    for epoch in range(40):
        order = MIX.order(8, seed=3, lengths=lengths)
        order.set_epoch(epoch)
        indices = list(order)
        assert len(indices) == len(order) == 840
        counts.update(0 if i < 500 else 1 if i < 540 else 2 for i in indices)
    total = sum(counts.values())
    for source, share in enumerate(MIX.shares):
        spread = (share * (1 - share) / total) ** 0.5
        assert abs(counts[source] / total - share) < 4 * spread


@pytest.mark.parametrize("size", [6, 8, 100])
def test_a_batch_can_hold_the_rows_of_one_source(size):
    blocks = Mixture([3.0, 1.0, 1.0], [5000, 400, 3000], by_batch=True)
    indices = list(blocks.order(size, seed=3))
    assert len(indices) == 8400
    sources = [0 if i < 5000 else 1 if i < 5400 else 2 for i in indices]
    batches = [sources[i : i + size] for i in range(0, len(sources), size)]
    assert all(len(set(batch)) == 1 for batch in batches)
    share = sum(batch[0] == 0 for batch in batches) / len(batches)
    assert abs(share - 0.6) < 4 * (0.24 / len(batches)) ** 0.5


def test_a_source_is_gone_through_before_it_begins_again():
    small = [i for i in MIX.order(8, seed=3) if 500 <= i < 540]
    for start in range(0, len(small) - 40, 40):
        assert len(set(small[start : start + 40])) == 40


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 5), start=st.integers(0, 839))
def test_the_order_is_a_function_of_seed_and_epoch(seed, epoch, start):
    first, again = MIX.order(4, seed), MIX.order(4, seed)
    first.set_epoch(epoch), again.set_epoch(epoch)
    assert list(first)[start:] == list(itertools.islice(again, start, None)), "what a resumed run walks"
    other = MIX.order(4, seed)
    other.set_epoch(epoch + 1)
    assert list(other) != list(first)


def test_a_list_of_sources_is_prepared_source_by_source(tmp_path, word_tokenizer):
    for name, count in (("a", 30), ("b", 10)):
        rows = [{"prompt": f"w{i} {name} ", "completion": f"w{i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [
        {"source": "auto", "path": str(tmp_path / "a.jsonl"), "weight": 1},
        {"source": "auto", "path": str(tmp_path / "b.jsonl"), "weight": 3},
    ]
    config = DataConfig.model_validate({"train": parts, "validation": None, "max_length": 32})
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config, (
        "the resolved recipe reads back"
    )
    rows, _ = load_data(config)
    prepared = prepare(rows, word_tokenizer, config)
    assert prepared.dataset.mixture == Mixture([1.0, 3.0], [30, 10])
    assert list(prepared.report.mix.values()) == [0.25, 0.75] and prepared.report.rows == 40
    assert len(set(prepared.dataset["example_id"])) == 40


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "name at least one"),
        ([{"source": "wordmath", "weight": -1}], "greater than 0"),
        ([[{"source": "wordmath"}]], "a mixture inside a mixture"),
        ({"source": "mixture"}, "a mixture is a list of sources"),
    ],
)
def test_bad_mixtures(train, message):
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"train": train})


def test_a_resumed_mixture_is_bitwise_the_uninterrupted_one(tmp_path):
    """Past an epoch's end too: 24 rows, batches of 4, ten steps; resumed at 3 and at 8."""
    import torch
    from datasets import Dataset

    from headgate.data.collation import Collator
    from headgate.models.load import load_model
    from headgate.training.trainer import HeadgateTrainer
    from tests.training.arguments import arguments_in

    stream = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 1000, (8 + i % 5,), generator=stream).tolist() for i in range(24)]
    rows = Dataset.from_list([{"input_ids": row, "labels": row, "length": len(row)} for row in ids])
    rows.mixture = Mixture([1.0, 2.0], [16, 8])

    def trainer(folder):
        model, tokenizer = load_model("random:llama", lora={"dropout": 0.1}, seed=1, device="cpu")
        arguments = arguments_in(
            tmp_path / folder, max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=1, seed=5
        )  # fmt: skip
        return HeadgateTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=Collator(tokenizer.pad_token_id)
        )

    def trained(one):
        return {name: p.detach().clone() for name, p in one.named_trainable.items()}

    whole = trainer("whole")
    whole.train()
    for at in (3, 8):
        again = trainer(f"again-{at}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(again).items())
