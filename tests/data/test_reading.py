"""Every form that data comes in gives the same rows; what is wrong is said with its place, at once."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time

import datasets
import pytest

from headgate.data import DataConfig, SourceConfig, content_digest, load_data, load_rows, prepare
from headgate.data.checks import check_data
from headgate.data.readers import SOURCES
from headgate.errors import ConfigError, DataError

ROWS = [{"prompt": f"What is {i}?\n", "completion": f"It is, well, {i}."} for i in range(40)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def in_form(folder, form):
    """The path of ROWS in one of the forms."""
    whole = datasets.Dataset.from_list(ROWS)
    if form in ("jsonl", "ndjson"):
        (folder / f"rows.{form}").write_text(lines(ROWS))
    elif form == "json":
        (folder / "rows.json").write_text(json.dumps({"data": ROWS}, indent=1))
    elif form in ("csv", "tsv"):
        whole.to_csv(folder / f"rows.{form}", sep="," if form == "csv" else "\t")
    elif form == "parquet":
        whole.to_parquet(folder / "rows.parquet")
    elif form == "arrow":
        whole.save_to_disk(folder / "other")
        (folder / "rows.arrow").write_bytes(next((folder / "other").glob("*.arrow")).read_bytes())
    elif form in ("jsonl.gz", "jsonl.bz2", "jsonl.xz"):
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[form.split(".")[1]]
        (folder / f"rows.{form}").write_bytes(pack(lines(ROWS).encode()))
    elif form == "shards":
        for i in range(3):
            whole.shard(3, i, contiguous=True).to_parquet(folder / f"train-{i:05d}-of-00003.parquet")
        return str(folder)
    elif form == "glob":
        in_form(folder, "shards")
        return str(folder / "train-*.parquet")
    elif form == "saved":
        whole.save_to_disk(folder / "saved")
        return str(folder / "saved")
    elif form == "saved splits":
        datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(folder / "dict")
        return str(folder / "dict")
    elif form == "hub cache":
        root = folder / "datasets--some--body"
        (root / "refs").mkdir(parents=True)
        (root / "refs/main").write_text("abc123")
        for name in ("main", "other"):
            data = root / "snapshots/abc123" / name
            data.mkdir(parents=True)
            rows = whole if name == "main" else whole.select([0])
            rows.to_parquet(data / "train-00000-of-00001.parquet")
        (root / "snapshots/abc123/README.md").write_text("# card")
        return str(root)
    return str(folder / f"rows.{form}")


FORMS = [
    "jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "shards", "glob",
    "saved", "saved splits", "hub cache",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    name = "main" if form == "hub cache" else None
    rows = load_rows(SourceConfig(source="auto", path=in_form(tmp_path, form), name=name))
    assert [{k: row[k] for k in ("prompt", "completion")} for row in rows] == ROWS
    assert len(set(rows["example_id"])) == len(ROWS)


def test_columns_templates_and_filters(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('q,a,level\n"One, two?",3,easy\nFour?,5,hard\n')
    columns = {"prompt": "Q: {q}\nA: ", "completion": "a"}
    source = SourceConfig(source="prompt_completion", path=str(path), columns=columns)
    assert load_rows(source)["prompt"] == ["Q: One, two?\nA: ", "Q: Four?\nA: "]
    kept = load_rows(source.model_copy(update={"filter": {"level": ["hard"]}}))
    assert kept["completion"] == ["5"]


def test_slices_of_local_files(tmp_path):
    path = in_form(tmp_path, "jsonl")
    assert load_rows(SourceConfig(source="auto", path=path, split="train[10:12]"))["prompt"] == [
        row["prompt"] for row in ROWS[10:12]
    ]


def test_documents_stay_whole(tmp_path):
    text = "    indented\n" + "A line of some length.\r\n" * 2000 + "\tend"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (row,) = load_rows(SourceConfig(source="text", path=str(tmp_path / "a.txt")))
    assert row["text"] == text.replace("\r\n", "\n")
    asked = SourceConfig(source="text", path=str(tmp_path / "a.txt"), options={"chunk_characters": 1000})
    pieces = load_rows(asked)["text"]
    assert "".join(pieces) == row["text"] and max(map(len, pieces)) <= 1000


CALL = {"type": "function", "function": {"name": "time", "arguments": {"city": "Rome"}}}
OTHER = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": [2]}}}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_tool_calls_and_tools_survive_as_they_are(tmp_path, form):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "1", "tool_call_id": "x"},
                {"role": "assistant", "content": "done"},
            ],
            "tools": [{"type": "function", "function": {"name": call["function"]["name"]}}],
        }
        for call in (CALL, OTHER)
    ]
    path = tmp_path / f"chat.{form}"
    if form == "jsonl":
        path.write_text(lines(rows))
    else:  # as the hub stores what has no common type: JSON text
        texts = [{k: json.dumps(v) for k, v in row.items()} for row in rows]
        datasets.Dataset.from_list(texts).to_parquet(path)
    loaded = load_rows(SourceConfig(source="messages", path=str(path)))
    assert [row["messages"][1]["tool_calls"] for row in loaded] == [[CALL], [OTHER]]
    assert loaded[0]["messages"][2] == {"role": "tool", "content": "1", "tool_call_id": "x"}
    assert [tool["function"]["name"] for row in loaded for tool in row["tools"]] == ["time", "sum"]


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_reads_its_own_example(tmp_path, name):
    path = tmp_path / "one.jsonl"
    path.write_text(lines([SOURCES[name].example]))
    split = {"split": "test"} if name == "mbpp" else {}
    (row,) = load_rows(SourceConfig(source=name, path=str(path), **split))
    assert row.get("prompt") or row.get("text") or row.get("messages")
    if name not in ("text", "tinystories", "shakespeare", "wikitext"):
        auto = load_rows(SourceConfig(source="auto", path=str(path)))[0]
        assert {k: v for k, v in auto.items() if k != "family"} == {k: v for k, v in row.items() if k != "family"}  # fmt: skip


def test_content_names_data_and_its_place_does_not(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "x.jsonl").write_text(lines(ROWS))
    one, two = (SourceConfig(source="auto", path=str(tmp_path / f / "x.jsonl")) for f in ("a", "b"))
    assert content_digest(one) == content_digest(two)
    before = content_digest(DataConfig(train=one, validation=None))
    (tmp_path / "a/x.jsonl").write_text(lines(ROWS[:-1]))
    assert content_digest(DataConfig(train=one, validation=None)) != before
    assert len(load_rows(one)) == 39, "a changed file is read again"


def test_rows_with_empty_prompts_are_told_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": "", "completion": f"text {i}"} for i in range(200)]))
    source = SourceConfig(source="auto", path=str(path), options={"validation_share": 0.3})
    train, validation = load_data(DataConfig(train=source, validation=source))
    assert len(train) + len(validation) == 200 and 30 < len(validation) < 90


def wrong(tmp_path):
    """Ten wrong inputs: (data block, what must be said)."""
    (tmp_path / "a.csv").write_text("question,answer\nwhat,4\n")
    (tmp_path / "ragged.csv").write_text("prompt,completion\na,b\na,b,c\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n')
    (tmp_path / "short.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "chat.jsonl").write_text(
        lines([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    )
    (tmp_path / "roles.jsonl").write_text(lines([{"messages": [{"role": "pope", "content": "a"}]}]))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "shards").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "shards/train-00000-of-00002.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")

    def at(name, source="prompt_completion", **more):
        return {"source": source, "path": str(tmp_path / name), **more}

    return [
        ({"source": "gsmk8"}, r"data.train: unknown source 'gsmk8': did you mean 'gsm8k'"),
        (at("no.csv"), r"data.train: data path '.*no.csv' does not exist.*did you mean '.*a.csv'"),
        (at("a.csv"), r"a.csv:2: no field 'prompt' \(the row has: question, answer\)"),
        (
            at("a.csv", columns={"prompt": "question", "completion": "anwser"}),
            r"a.csv:2: columns.completion asks for column 'anwser', which is not there: did you mean 'answer'",
        ),
        (at("ragged.csv"), r"ragged.csv:3: more values than the header's 2 columns"),
        (at("bad.jsonl"), r"bad.jsonl:2: not JSON"),
        (at("short.jsonl"), r"short.jsonl:2: no field 'completion'"),
        (at("empty.jsonl"), r"'.*empty.jsonl' is empty"),
        (at("chat.jsonl", "messages"), r"no chat template: set data.chat_template"),
        (at("roles.jsonl", "messages"), r"roles.jsonl:1, message 1: role 'pope' is unknown"),
        (at("latin.txt", "text"), r"latin.txt' cannot be read as UTF-8"),
        (at("shards", "auto"), r"shard '.*train-00001-of-00002.parquet' is missing"),
        (at("broken.parquet"), r"broken.parquet' is no readable parquet file"),
        ([{"source": "wordmath", "weight": 0}], r"weight"),
    ]


@pytest.mark.parametrize("case", range(14))
def test_wrong_data_is_one_line_with_its_place_at_once(tmp_path, case):
    train, message = wrong(tmp_path)[case]
    started = time.process_time()
    with pytest.raises((DataError, ConfigError, ValueError), match=message) as error:
        check_data(DataConfig.model_validate({"train": train, "validation": None}), "embedded")
    assert time.process_time() - started < 3
    assert "\n" not in str(error.value) or "validation error" in str(error.value)


def test_a_recipe_whose_data_is_right_is_summarised(tmp_path):
    path = in_form(tmp_path, "jsonl")
    (line,) = check_data(
        DataConfig(train=SourceConfig(source="auto", path=path), validation=None), "embedded"
    )
    assert line == f"data.train: {path}, train: completion, prompt"


def test_one_document_cannot_be_held_out_in_part(tmp_path, word_tokenizer):
    (tmp_path / "a.txt").write_text("w1 w2 w3 " * 50)
    source = SourceConfig(source="text", path=str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"options.chunk_characters divides it"):
        load_data(DataConfig(train=source, validation=source))
    prepared = prepare(load_rows(source), word_tokenizer, DataConfig(max_length=16, validation=None))
    assert sum(prepared.dataset["length"]) == 151
