"""Sources: what is read, how splits stay apart, and what bad input says."""

import gzip
import json
import os
import subprocess
import sys

import datasets
import pytest

from headgate.data import (
    DataConfig,
    SkillConfig,
    SourceConfig,
    check_disjoint,
    load_data,
    load_rows,
    load_stream,
    prepare,
)
from headgate.data.files import split_slice
from headgate.data.tags import hash_tags, keyword_class, keyword_tags
from headgate.errors import ConfigError, DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def problems(tmp_path):
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1:,}"}
        for i in range(2000)
    ]
    return write(tmp_path / "problems.jsonl", rows)


def test_styles_of_gsm8k(problems):
    rationale = load_rows(SourceConfig(source="gsm8k", path=str(problems)))[1500]
    answer = load_rows(SourceConfig(source="gsm8k", path=str(problems), style="answer"))[1500]
    assert rationale["prompt"] == answer["prompt"] == "What is 1500 + 1?\nThe answer is: "
    assert rationale["completion"].endswith("#### 1,501") and answer["completion"] == "1501"
    assert rationale["answer"] == answer["answer"] == "1501"


def test_one_file_for_both_splits_is_divided_by_content(problems):
    source = SourceConfig(source="gsm8k", path=str(problems))
    train, validation = load_data(
        DataConfig(train=source, validation=source.model_copy(update={"split": "validation"}))
    )
    assert len(train) + len(validation) == 2000 and 60 < len(validation) < 145
    assert not set(train["prompt"]) & set(validation["prompt"])
    again, _ = load_data(DataConfig(train=source, validation=source))
    assert again["prompt"] == train["prompt"]


def test_limit_takes_the_first_rows_or_a_seeded_sample(problems):
    first = load_rows(SourceConfig(source="gsm8k", path=str(problems), limit=5))
    assert first["example_id"] == [f"problems.jsonl[train]:{i}" for i in range(5)]
    options = {"sample_seed": 42}
    sample = load_rows(SourceConfig(source="gsm8k", path=str(problems), limit=5, options=options))
    assert sample["example_id"] != first["example_id"]
    assert (
        sample["example_id"]
        == load_rows(SourceConfig(source="gsm8k", path=str(problems), limit=5, options=options))["example_id"]
    )


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "jsonl.gz"])
def test_formats_give_the_same_rows(tmp_path, suffix):
    rows = [{"prompt": f"p{i} ", "completion": f"c{i}"} for i in range(4)]
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif suffix == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        write(path, rows)
    for source in (
        SourceConfig(source="auto", path=str(path)),
        SourceConfig(source="auto", path=str(tmp_path)),
    ):
        loaded = load_rows(source)
        assert [(row["prompt"], row["completion"]) for row in loaded] == [
            (r["prompt"], r["completion"]) for r in rows
        ]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages"}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"messages"}),
        ({"instruction": "a", "input": "", "output": "b"}, {"prompt", "completion"}),
        ({"instruction": "a", "input": "x", "response": "b"}, {"prompt", "completion"}),
        ({"question": "a", "answer": "so\n#### 3"}, {"prompt", "completion", "answer"}),
        ({"text": "some text"}, {"text"}),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            {"messages"},
        ),
    ],
)
def test_auto_reads_known_columns(tmp_path, raw, expected):
    row = load_rows(SourceConfig(source="auto", path=str(write(tmp_path / "x.jsonl", [raw]))))[0]
    assert expected <= {name for name, value in row.items() if value is not None}


def test_text_is_divided_into_documents(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("One story.<|endoftext|>Another story.<|endoftext|>\n")
    assert load_rows(SourceConfig(source="text", path=str(path)))["text"] == ["One story.", "Another story."]
    path.write_text("\n = First = \n\n text \n\n = = Part = = \n\n more \n\n = Second = \n\n end \n")
    assert len(load_rows(SourceConfig(source="wikitext", path=str(path)))) == 2
    path.write_text("A line of verse\n" * 1000)
    loaded = load_rows(SourceConfig(source="text", path=str(path), options={"chunk_characters": 500}))
    assert sum(text.count("A line of verse") for text in loaded["text"]) == 1000
    assert all(len(text) <= 500 for text in loaded["text"])


def test_long_text_goes_on_in_the_next_row(tmp_path, word_tokenizer):
    words = " ".join(f"w{i % 190}" for i in range(100))
    prepared = prepare([{"example_id": "t", "text": words}], word_tokenizer, DataConfig(max_length=30))
    ids = [token for row in prepared.dataset for token in row["input_ids"]]
    assert ids == [*word_tokenizer(words)["input_ids"], word_tokenizer.eos_token_id]
    assert prepared.report.truncated == 0


def test_prepare_counts_truncation_and_adjusts_to_the_context(word_tokenizer):
    rows = [{"example_id": f"r{i}", "prompt": "w1 ", "completion": "w2 " * (10 * i + 1)} for i in range(4)]
    with pytest.warns(UserWarning, match=r"max_length=512 exceeds the model's context of 16"):
        prepared = prepare(rows, word_tokenizer, DataConfig(max_length=512), context_length=16)
    assert prepared.report.truncated == 2 and prepared.report.max_length == 16
    assert max(prepared.dataset["length"]) == 16
    long = {"example_id": "long-one", "prompt": "w1 " * 20, "completion": "w2"}
    with pytest.raises(DataError, match="long-one"):
        prepare([long], word_tokenizer, DataConfig(max_length=16))


def test_overlap_is_found_whatever_the_punctuation(tmp_path):
    train = [{"example_id": "a", "prompt": "What is 1 + 1?\n"}]
    other = [{"example_id": "b", "prompt": "what is  1+1"}, {"example_id": "c", "prompt": "What is 2?"}]
    with pytest.raises(DataError, match=r"1 of 2 validation rows.*\(b\).*validation_share"):
        check_disjoint(train, other)
    with pytest.warns(UserWarning, match="1 of 2"):
        assert check_disjoint(train, other, overlap="warn").shared == 1


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train[:12]", "train[12:20]"), ("train[8:]", "train[:8]")],
)
def test_slices_of_one_file_that_share_no_row_are_taken_as_written(problems, train, validation):
    """A share of 5% held out besides would leave a fraction of the rows that were asked for."""

    def source(split):
        return SourceConfig(source="gsm8k", path=str(problems), split=split)

    rows = [row["prompt"] for row in load_rows(source("train"))]
    trained, held_out = load_data(DataConfig(train=source(train), validation=source(validation)))
    for part, split in ((trained, train), (held_out, validation)):
        assert [row["prompt"] for row in part] == rows[split_slice(split)]


def test_slices_that_overlap_are_divided_by_hash(problems):
    both = {"source": "gsm8k", "path": str(problems)}
    config = DataConfig(
        train=SourceConfig(**both, split="train[:20]", options={"validation_share": 0.3}),
        validation=SourceConfig(**both, split="train[10:30]"),
    )
    trained, held_out = load_data(config)
    assert not set(trained["prompt"]) & set(held_out["prompt"])


def test_a_stream_has_steps_names_and_disjoint_validation(problems):
    words = SkillConfig(skill="words", source="wordmath", limit=300)
    sums = SkillConfig(skill="sums", source="gsm8k", path=str(problems), labelled=False)
    stream = load_stream([words, sums, words], max_steps=100)
    assert [segment.name for segment in stream] == ["words", "sums", "words#2"]
    assert [segment.steps for segment in stream] == [33, 33, 34] and sum(s.steps for s in stream) == 100
    assert stream[0].train["prompt"] == stream[2].train["prompt"]
    for segment in stream:
        assert not set(segment.train["prompt"]) & set(segment.validation["prompt"])
    with pytest.raises(ConfigError, match="no steps"):
        load_stream([words])


BAD_LINE = '{"question": "a", "answer": "b\\n#### 1"}\n{"question": "no answer"}\n'


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (None, "gsm8k", "does not exist"),
        ("", "gsm8k", "is empty"),
        (BAD_LINE, "gsm8k", r"bad.jsonl:2: no field 'answer' \(the row has: question\)"),
        ('{"text": "x"}\n{"text": \n', "auto", r"bad.jsonl:2: not JSON"),
        ("[1]\n", "auto", r"bad.jsonl:1: a JSON object is needed"),
        ('{"question": "a", "answer": "7"}\n', "gsm8k", "bad.jsonl:1.*####"),
        ('{"colour": "red"}\n', "auto", r"columns \['colour'\] fit no reader"),
        (
            '{"conversations": [{"from": "martian", "value": "x"}]}\n',
            "sharegpt",
            "bad.jsonl:1: turn 1.*martian",
        ),
    ],
)
def test_bad_files_name_file_line_and_cure(tmp_path, content, source, message):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(SourceConfig(source=source, path=str(path)))


def test_other_bad_requests(tmp_path, problems):
    with pytest.raises(DataError, match="did you mean 'gsm8k'"):
        load_rows(SourceConfig(source="gsmk8"))
    with pytest.raises(DataError, match="did you mean 'families'"):
        load_rows(SourceConfig(options={"familes": ["farm"]}))
    with pytest.raises(DataError, match=r"no file for split 'test'.*problems.jsonl"):
        load_rows(SourceConfig(source="gsm8k", path=str(tmp_path), split="test"))
    with pytest.raises(DataError, match=r"split 'validation'.*empty after filtering"):
        load_rows(
            SourceConfig(
                source="gsm8k", path=str(problems), split="validation", options={"validation_share": 0}
            )
        )
    with pytest.raises(DataError, match="needs a path"):
        load_rows(SourceConfig(source="text"))


def test_tags_are_stable_distinct_and_in_range():
    text = "Anna has 3 bags with 4 nuts each. How many nuts are there?"
    for tags in (hash_tags(text, 32, 3, seed=1), keyword_tags(text, 32, 3, seed=1)):
        assert len(set(tags)) == 3 and all(0 <= tag < 32 for tag in tags)
    assert hash_tags(text, 32, 1, seed=1) != hash_tags(text, 32, 1, seed=2) or hash_tags(
        text, 32, 4
    ) != hash_tags(text, 32, 4, 9)
    assert keyword_class(text) == 4
    assert keyword_class("Ben has 9 kites and loses 4. How many are left?") == 2
    assert all(tag // 4 == keyword_class(text) for tag in keyword_tags(text, 32, 4))


def test_rows_and_tags_do_not_depend_on_the_process(problems):
    code = (
        "import json, sys; from headgate.data import *; from headgate.data.tags import hash_tags;"
        "c = SourceConfig(source='gsm8k', path=sys.argv[1], options={'validation_share': .1}, split='validation');"
        "print(json.dumps([list(load_rows(c)['example_id']), hash_tags('a problem', 32, 4, 7)]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99"}
    printed = subprocess.run(
        [sys.executable, "-c", code, str(problems)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    config = SourceConfig(
        source="gsm8k", path=str(problems), options={"validation_share": 0.1}, split="validation"
    )
    assert json.loads(printed.stdout) == [
        list(load_rows(config)["example_id"]),
        hash_tags("a problem", 32, 4, 7),
    ]


REAL = [
    ("gsm8k", "gsm8k/train.jsonl", "train", 7473, {"prompt", "completion", "answer"}),
    ("gsm8k", "gsm8k", "test", 1319, {"prompt", "completion", "answer"}),
    ("mbpp", "mbpp/mbpp.jsonl", "train", 374, {"prompt", "completion", "meta_tests"}),
    ("mbpp", "mbpp/mbpp.jsonl", "test", 500, {"prompt", "completion", "meta_tests"}),
    ("humaneval", "humaneval/HumanEval.jsonl.gz", "test", 164, {"prompt", "completion", "meta_tests"}),
    ("alpaca", "codealpaca/code_alpaca_2k.json", "train", 2017, {"prompt", "completion"}),
    ("auto", "codealpaca/new_codealpaca.json", "train", 4535, {"prompt", "completion"}),
    ("tinystories", "tinystories/tinystories_sample_small.txt", "train", 5, {"text"}),
    ("wikitext", "wikitext-2/valid.txt", "validation", 60, {"text"}),
]


@pytest.mark.shared
@pytest.mark.parametrize(("source", "path", "split", "count", "columns"), REAL)
def test_real_data_sets(shared, source, path, split, count, columns):
    rows = load_rows(SourceConfig(source=source, path=str(shared / "data" / path), split=split))
    assert len(rows) == count and columns <= set(rows.column_names)
    assert len(set(rows["example_id"])) == count


@pytest.mark.shared
def test_the_official_splits_of_gsm8k_share_no_question(shared):
    folder = str(shared / "data/gsm8k")
    train, test = (
        load_rows(SourceConfig(source="gsm8k", path=folder, split=split)) for split in ("train", "test")
    )
    assert check_disjoint(train, test).shared == 0
