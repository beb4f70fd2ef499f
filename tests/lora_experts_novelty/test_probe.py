"""Laws of the look through the bare model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headgate.data.collation import Collator
from headgate.data.packing import pack
from headgate.methods.lora_experts.probe import reference_text, skill_embeddings
from headgate.models.load import load_model
from tests.training.conftest import make_rows


@pytest.fixture(scope="module")
def adapted() -> Any:
    return load_model("random:llama", lora={"dropout": 0.5}, seed=1, device="cpu")


def batches(tokenizer: Any, size: int, count: int = 12) -> list[Any]:
    rows, collate = make_rows(count), Collator(tokenizer.pad_token_id)
    return [collate([rows[i] for i in range(at, at + size)]) for at in range(0, count, size)]


def test_adapters_and_dropout_are_off_and_come_back(adapted: Any) -> None:
    model, tokenizer = adapted
    model.train()
    needs = {n: p.requires_grad for n, p in model.named_parameters()}
    before, _ = skill_embeddings(model, batches(tokenizer, 4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.3)
    after, _ = skill_embeddings(model, batches(tokenizer, 4))
    assert torch.equal(before, after) and model.training
    assert needs == {n: p.requires_grad for n, p in model.named_parameters()}
    ids = batches(tokenizer, 4)[0]["input_ids"]
    model.eval()
    with torch.no_grad():
        on = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, on)


def test_batching_and_padding_do_not_matter(adapted: Any) -> None:
    model, tokenizer = adapted
    alone, together = (skill_embeddings(model, batches(tokenizer, size)) for size in (1, 12))
    torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=1e-5)
    assert alone[1].tolist() == together[1].tolist() == [12 + i % 7 for i in range(12)]


def test_packed_documents_are_samples_of_their_own(adapted: Any) -> None:
    model, tokenizer = adapted
    packed = pack(list(make_rows(12)), 64)
    batch = Collator(tokenizer.pad_token_id)([packed[i] for i in range(len(packed))])
    means, tokens = skill_embeddings(model, [batch])
    plain, lengths = skill_embeddings(model, batches(tokenizer, 12))
    assert len(packed) < 12 and sorted(tokens.tolist()) == sorted(lengths.tolist())
    distance = torch.cdist(means, plain).min(1).values
    assert float(distance.max()) < 1e-4


def test_it_reads_no_more_than_it_needs(adapted: Any) -> None:
    model, tokenizer = adapted
    some = batches(tokenizer, 4)
    assert len(skill_embeddings(model, some, min_samples=5, min_tokens=1)[1]) == 8
    assert len(skill_embeddings(model, some, min_samples=4, min_tokens=1)[1]) == 4
    assert len(skill_embeddings(model, some, min_samples=1, min_tokens=70)[1]) == 8
    assert len(skill_embeddings(model, some)[1]) == 12  # all there is: the policy will find it too little
    assert skill_embeddings(model, [])[0].shape == (0, 64)


def test_the_reference_is_the_models_own_and_moves_no_other_draw(adapted: Any) -> None:
    model, _ = adapted
    torch.manual_seed(7)
    first = reference_text(model, 3)["input_ids"]
    assert first.numel() >= 2048
    drawn = torch.rand(3)
    torch.manual_seed(8)
    assert torch.equal(reference_text(model, 3)["input_ids"], first)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    assert not torch.equal(reference_text(model, 4)["input_ids"], first)
