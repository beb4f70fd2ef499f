"""Prepared once: one store for whoever asks, made by one of them, named by everything that it follows from."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from headgate.data import DataConfig, SourceConfig, load_data, load_rows, prepare
from headgate.data.cache import cache_root, entry
from headgate.data.templates import encode
from headgate.data.token_store import tokenizer_digest

from .tokenizer_families import family


def stores(kind="tokens"):
    return {path.parent.name for path in (cache_root() / kind).glob("*/done.json")}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def config(own_cache):
    rows = [{"prompt": f"What is {i}?\n", "completion": f"It is\n    {i} " * (i % 5 + 1)} for i in range(60)]
    (own_cache / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=SourceConfig(source="auto", path=str(own_cache / "a.jsonl")), validation=None)


def test_the_store_holds_what_encode_gives(config):
    tokenizer = family("gpt-neox (trimmed)")
    rows, _ = load_data(config)
    prepared = prepare(rows, tokenizer, config)
    assert prepared.report.masks_checked >= 32
    for row, stored in zip(rows, prepared.dataset, strict=True):
        wanted = encode(row, tokenizer, config.max_length)
        assert {name: stored[name] for name in ("input_ids", "labels", "length", "prompt_length")} == {
            name: value for name, value in wanted.items() if name != "truncated"
        }
        assert stored["example_id"] == row["example_id"]
    listed = prepare(list(rows), tokenizer, config)
    assert listed.report.as_dict() == prepared.report.as_dict()
    assert list(listed.dataset) == list(prepared.dataset)


def test_a_second_time_reads_and_whatever_matters_makes_another(config):
    tokenizer = family("gpt2")
    rows, _ = load_data(config)
    prepare(rows, tokenizer, config)
    made = stores()
    prepare(load_data(config)[0], tokenizer, config)
    assert stores() == made and len(made) == 1
    prepare(rows, tokenizer, config.model_copy(update={"max_length": 16}))
    prepare(rows, tokenizer, config.model_copy(update={"loss_on": "all"}))
    prepare(rows, family("qwen2"), config)
    prepare(rows.select(range(10)), tokenizer, config)
    assert len(stores()) == 5
    prepare(rows, tokenizer, config, columns={"tags": lambda row: [len(row["prompt"])]})
    assert len(stores()) == 5, "a method's columns stand beside the store"


def test_a_methods_columns_follow_their_row(config):
    rows, _ = load_data(config)
    prepared = prepare(rows, family("gpt2"), config, columns={"size": lambda row: len(row["prompt"])})
    assert [row["size"] for row in prepared.dataset] == [len(row["prompt"]) for row in rows]


PREPARE = """
import sys
from transformers import PreTrainedTokenizerFast
from headgate.data import DataConfig, SourceConfig, load_data, prepare
config = DataConfig(train=SourceConfig(source="auto", path=sys.argv[1]), validation=None)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2], eos_token="</s>")
prepared = prepare(load_data(config)[0], tokenizer, config)
print(prepared.report.tokens, prepared.dataset._fingerprint)
"""


def test_processes_at_once_make_one_store(config, own_cache):
    tokenizer = family("gpt2")
    tokenizer.backend_tokenizer.save(str(own_cache / "tokenizer.json"))
    command = [sys.executable, "-c", PREPARE, config.train.path, str(own_cache / "tokenizer.json")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(2)
    ]
    printed = {process.communicate()[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running) and len(printed) == 1
    assert len(stores()) == len(stores("rows")) == 1


def test_what_an_interrupted_process_left_is_made_again(own_cache):
    folder = cache_root() / "rows" / "key"
    folder.mkdir(parents=True)
    (folder / "torn").write_text("half")

    def fill(place):
        assert not (place / "torn").exists()
        (place / "whole").write_text("whole")
        return {"rows": 1}

    assert entry("rows", "key", fill) == (folder, {"rows": 1})
    with pytest.raises(ZeroDivisionError):
        entry("rows", "other", lambda place: 1 / 0)  # type: ignore[arg-type]
    assert not (cache_root() / "rows" / "other").exists()


def test_several_processes_give_the_rows_of_one(config, monkeypatch):
    monkeypatch.setattr("headgate.data.token_store.ROWS_PER_PROCESS", 20)
    rows, tokenizer = load_rows(config.train), family("llama (byte fallback, bos)")
    monkeypatch.setenv("HEADGATE_WORKERS", "1")
    one = list(prepare(rows, tokenizer, config).dataset)
    monkeypatch.setenv("HEADGATE_WORKERS", "3")
    several = list(prepare(rows.select(range(len(rows))), tokenizer, config.model_copy(update={"max_length": 511})).dataset)  # fmt: skip
    assert several == one


def test_the_digest_of_a_tokenizer_follows_its_content():
    tokenizer = family("gpt2")
    before = tokenizer_digest(tokenizer)
    assert tokenizer_digest(tokenizer) == before != tokenizer_digest(family("qwen2"))
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages }}"
        assert tokenizer_digest(tokenizer) != before
    finally:
        tokenizer.chat_template = kept
