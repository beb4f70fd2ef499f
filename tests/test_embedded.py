"""The shipped model: small, complete, able in its own language, poor at the target families."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headgate.models
from headgate.data import encode, prompt_ids, wordmath

FOLDER = Path(headgate.models.__file__).parent / "embedded"
PROMPT = "{question}\nThe answer is: "


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def exact_match(model, tokenizer, rows):
    prompts = [prompt_ids({"prompt": PROMPT.format(**row)}, tokenizer) for row in rows]
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    generated = model.generate(**padded, max_new_tokens=110, do_sample=False)[
        :, padded["input_ids"].shape[1] :
    ]
    outputs = tokenizer.batch_decode(generated, skip_special_tokens=True)
    hits = [
        out.rsplit("####", 1)[-1].strip() == row["answer"].rsplit("####", 1)[1].strip()
        for out, row in zip(outputs, rows)
    ]
    return sum(hits) / len(rows)


def test_it_is_small_and_complete(model):
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 8e6
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 2e6
    assert model.config.num_hidden_layers >= 8 and model.config.max_position_embeddings == 512
    assert {"README.md", "training_log.jsonl", "loss_curve.png"} <= {path.name for path in FOLDER.iterdir()}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_its_tokenizer_is_lossless_with_single_digits(tokenizer):
    assert tokenizer.is_fast
    assert [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token] == ["<pad>", "<bos>", "<eos>"]
    for text in ("Anna has 1234 hats.\n#### 56", "naïve café 🙂", "  two  spaces\tand\n\nlines"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert [token for token in tokenizer.tokenize("1234") if token.strip("Ġ")] == list("1234")


def test_training_and_generation_see_the_same_tokens(tokenizer):
    for row in wordmath.generate("train", 50):
        normal = {"prompt": PROMPT.format(**row), "completion": row["answer"]}
        encoded = encode(normal, tokenizer)
        assert encoded["input_ids"][: encoded["prompt_length"]] == prompt_ids(normal, tokenizer)
        assert tokenizer.decode(encoded["labels"][encoded["prompt_length"] :]) == f" {row['answer']}<eos>"


def test_problems_are_short(tokenizer):
    lengths = [
        encode({"prompt": PROMPT.format(**r), "completion": r["answer"]}, tokenizer)["length"]
        for r in wordmath.generate("train", 300)
    ]
    assert 60 <= sum(lengths) / len(lengths) <= 110 and max(lengths) <= 160


def test_it_solves_its_own_families_and_not_the_targets(model, tokenizer):
    own = wordmath.generate("test", 60, families=wordmath.PRETRAINING_FAMILIES, seed=3)
    assert exact_match(model, tokenizer, own) >= 0.9
    assert exact_match(model, tokenizer, wordmath.generate("test", 80, seed=3)) < 0.25
