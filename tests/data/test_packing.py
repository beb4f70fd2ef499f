"""Packing and collation: every token once, no loss or attention across documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from headgate.data import Collator, DataConfig, pack, prepare
from headgate.data.packing import best_fit_decreasing
from headgate.data.templates import IGNORED
from headgate.errors import DataError

documents = st.lists(st.lists(st.integers(3, 90), min_size=1, max_size=24), min_size=1, max_size=30)


def rows_of(lists):
    return [
        {"input_ids": ids, "labels": list(ids), "length": len(ids), "example_id": f"d{i}"}
        for i, ids in enumerate(lists)
    ]


@settings(max_examples=60, deadline=None)
@given(documents)
def test_every_token_stands_once_in_whole_documents(lists):
    packed = pack(rows_of(lists), 24)
    seen = {}
    for row in packed:
        assert len(row["input_ids"]) == row["length"] <= 24
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        assert len(starts) == len(row["example_id"])
        for segment, (start, end) in enumerate(zip(starts, [*starts[1:], row["length"]])):
            seen[row["example_id"][segment]] = row["input_ids"][start:end]
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["segment_ids"][start:end] == [segment] * (end - start)
            assert row["labels"][start] == IGNORED
            assert row["labels"][start + 1 : end] == row["input_ids"][start + 1 : end]
    assert seen == {f"d{i}": ids for i, ids in enumerate(lists)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_best_fit_decreasing_is_near_optimal(lengths):
    """Johnson's bound: at most 11/9 of the optimum plus 4, and no two bins that would fit in one."""
    bins = best_fit_decreasing(lengths, 50)
    loads = sorted(sum(lengths[i] for i in members) for members in bins)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert loads[-1] <= 50
    assert len(loads) < 2 or loads[0] + loads[1] > 50
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 50) + 4 or sum(length > 25 for length in lengths) > 0


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="60 tokens does not fit in rows of 24"):
        pack(rows_of([[1] * 60]), 24)


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_packed_logits_equal_those_of_documents_alone():
    model = tiny_model()
    lists = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24], [31, 32], [41, 42, 43, 44, 45, 46, 47]]
    batch = Collator(0)(list(pack(rows_of(lists), 9)))
    assert "attention_mask" not in batch and batch["input_ids"].shape[0] > 1
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for ids in lists:
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            row, column = next(
                (r, c)
                for r in range(packed.shape[0])
                for c in range(batch["input_ids"].shape[1])
                if batch["input_ids"][r, c : c + len(ids)].tolist() == ids
            )
            torch.testing.assert_close(packed[row, column : column + len(ids)], alone, atol=1e-5, rtol=1e-5)


def test_padding_is_on_the_right_and_never_trained():
    batch = Collator(7, ("tags", "example_id"), pad_to_multiple_of=4)(
        [
            {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "tags": [1, 2], "example_id": "a"},
            {"input_ids": [4, 5, 6, 7, 8], "labels": [IGNORED] * 4 + [8], "tags": [3, 4], "example_id": "b"},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 7, 7, 7, 7], [4, 5, 6, 7, 8, 7, 7, 7]]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 5]
    assert (batch["labels"] != IGNORED).sum(-1).tolist() == [2, 1]
    assert batch["tags"].tolist() == [[1, 2], [3, 4]] and batch["example_id"] == ["a", "b"]


def test_a_missing_column_names_itself_and_its_method():
    collate = Collator(0, ("tags",), column_owners={"tags": "schema_bank"})
    with pytest.raises(DataError, match=r"schema_bank.*column 'tags'"):
        collate([{"input_ids": [1], "labels": [1]}])


def test_prepare_packs_with_columns_per_document(word_tokenizer):
    rows = [{"example_id": f"r{i}", "prompt": f"w{i} w1 ", "completion": "w2 " * (i + 1)} for i in range(6)]
    prepared = prepare(
        rows, word_tokenizer, DataConfig(max_length=16, packing=True), columns={"tags": lambda r: [3]}
    )
    assert sorted(name for row in prepared.dataset for name in row["example_id"]) == [
        f"r{i}" for i in range(6)
    ]
    assert all(tag == [3] for row in prepared.dataset for tag in row["tags"])
    assert sum(prepared.dataset["length"]) == prepared.report.tokens
    assert len(prepared.dataset) < len(rows) == prepared.report.rows
