"""From a file of one's own to a recipe: what is written is what is compared, and what cannot be told is asked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.cli.options import chosen_recipe
from headgate.errors import ConfigError, DataError
from headgate.experiments.arms import arm_recipes, check_comparison
from headgate.experiments.draft import draft
from headgate.experiments.recipe_file import load_recipe, parse_yaml, recipe_from
from headgate.experiments.run import run
from headgate.experiments.shipped import shipped, shipped_names
from headgate.training.saved import load

QUESTIONS = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}."} for n in range(40)]


def json_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return json_lines(tmp_path / "my data, 2.jsonl", QUESTIONS)


def test_empty_answers_are_told(tmp_path: Path) -> None:
    rows = [
        {**row, "answer": "" if number % 8 == 0 else row["answer"]} for number, row in enumerate(QUESTIONS)
    ]
    (note,) = [
        note for note in draft(json_lines(tmp_path / "some.jsonl", rows)).notes if "empty answer" in note
    ]
    assert note.startswith("5 of the first 40 rows") and "some.jsonl[train]:0 is one" in note
    with pytest.raises(DataError, match="answers of the first 40 rows are all empty"):
        draft(json_lines(tmp_path / "all.jsonl", [{**row, "answer": " "} for row in QUESTIONS]))


def test_a_table_under_the_name_of_lines_of_json_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("question,answer\n1+1,2\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: not JSON .*: if it is a table, name it .csv or .tsv"):
        draft(str(tmp_path / "rows.jsonl"))


def test_the_text_says_what_the_content_is(questions: str) -> None:
    drafted = draft(questions, "embedded", ["backward_gate", "lora_experts"])
    assert parse_yaml(drafted.text, "draft") == drafted.content
    recipe = recipe_from(drafted.content)
    assert recipe.compare is not None and list(recipe.compare.arms) == [
        "base",
        "lora",
        "backward_gate",
        "lora_experts",
    ]
    check_comparison(
        recipe, arm_recipes(recipe)
    )  # the metric is one that every arm has, the untrained one too
    assert recipe.data.train.options == recipe.data.validation.options == {"validation_share": 0.2}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rows", "columns", "loss_on"),
    [
        ([{"Question": f"q{n}", "Reply": f"a{n}"} for n in range(30)], {"prompt": "Question", "completion": "Reply"}, "completion"),
        ([{"id": n, "body_of_mail": f"mail {n}"} for n in range(30)], {"text": "body_of_mail"}, "all"),
        ([{"question": f"q{n}", "answer": n} for n in range(30)], {"prompt": "question", "completion": "answer"}, "completion"),
        ([{"text": f"story {n}"} for n in range(30)], {}, "all"),
        ([{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}]} for n in range(30)], {}, "completion"),
    ],
)  # fmt: skip
def test_columns_are_found(
    tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str], loss_on: str
) -> None:
    data = draft(json_lines(tmp_path / "rows.jsonl", rows)).content["data"]
    assert data["train"].get("columns", {}) == columns
    assert data["loss_on"] == loss_on


def test_a_csv_is_a_file_like_any(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["input", "target_text", "output"])
        writer.writeheader()
        writer.writerows({"input": f"in {n}", "target_text": "", "output": f"out {n}"} for n in range(30))
    assert draft(str(tmp_path / "rows.csv")).content["data"]["train"]["columns"] == {"prompt": "input", "completion": "output"}  # fmt: skip


def test_a_folder_with_its_own_validation_holds_nothing_out(tmp_path: Path) -> None:
    json_lines(tmp_path / "train.jsonl", QUESTIONS)
    json_lines(tmp_path / "validation.jsonl", [{"question": "Who?", "answer": "Ann."}] * 3)
    data = draft(str(tmp_path)).content["data"]
    assert data["validation"]["split"] == "validation" and "options" not in data["train"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"left": "a", "right": "b"}] * 30,
            "which column is asked and which answers cannot be told from left, right",
        ),
        ([{"question": "a", "answer": "b"}] * 5, "has 5 rows: give at least 20"),
        ([{"number": 3}] * 30, "cannot be told from number"),
    ],
)
def test_what_cannot_be_told_is_asked(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        draft(json_lines(tmp_path / "rows.jsonl", rows))


def test_wrong_names_are_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer_routing"):
        draft(str(tmp_path / "not there.jsonl"), methods=["layer_ruting"])
    with pytest.raises(DataError, match="not looked at"):
        draft("openai/gsm8k")
    with pytest.raises(DataError, match="does not exist"):
        draft(str(tmp_path / "not there.jsonl"))
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 100)
    with pytest.raises(DataError, match="chunk_characters"):
        draft(str(tmp_path / "book.txt"))


def test_a_recipe_or_data_and_never_both(questions: str, tmp_path: Path) -> None:
    for recipe, model, data, methods in (
        (None, None, None, None),
        (Path("a.yaml"), None, questions, None),
        (Path("a.yaml"), "embedded", None, None),
        (Path("a.yaml"), None, None, "backward_gate"),
    ):
        with pytest.raises(ConfigError, match=r"--data|--set"):
            chosen_recipe(recipe, model, data, methods, [])
    one = chosen_recipe(None, None, questions, "lora_experts", ["training.epochs=1"], compared=False)
    assert one.compare is None and one.lora is None and list(one.methods) == ["lora_experts"]
    assert one.training.epochs == 1


def test_init_writes_once(questions: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "mine.yaml"
    arguments = ["init", "--data", questions, "--methods", "backward_gate", "-o", str(output)]
    assert CliRunner().invoke(command_line("init"), arguments).exit_code == 0
    written = output.read_text()
    assert load_recipe(output).compare is not None
    again = CliRunner().invoke(command_line("init"), arguments)
    assert isinstance(again.exception, ConfigError) and "--force" in str(again.exception)
    assert output.read_text() == written


def test_every_recipe_of_the_package_goes_by_its_name() -> None:
    names = shipped_names()
    assert "demo/experts" in names and "lora_experts/quickstart" in names and len(names) > 40
    for name in names:
        path = shipped(name)
        assert path is not None and shipped(f"recipes/{name}.yaml") == path
        content = yaml.safe_load(path.read_text())
        assert "name" in content or "base" in content, name
    assert load_recipe("demo/bank") == load_recipe(shipped("demo/bank") or "")
    assert shipped("../pyproject") is None


def test_recipes_prints_one_or_lists_all() -> None:
    listed = CliRunner().invoke(command_line("recipes"), ["recipes"], env={"COLUMNS": "200"}).output
    assert all(name in listed for name in shipped_names())
    shown = CliRunner().invoke(command_line("recipes"), ["recipes", "show", "demo/bank"]).output
    assert shown == (shipped("demo/bank") or Path()).read_text()
    wrong = CliRunner().invoke(command_line("recipes"), ["recipes", "demo/bnak"]).exception
    assert isinstance(wrong, ConfigError) and "did you mean demo/bank?" in str(wrong)


def test_conversations_on_a_model_without_a_template_get_one(tmp_path: Path, capsys: Any) -> None:
    """What ``init`` writes must validate: a base model has no chat template, and most files are conversations."""
    from headgate.cli.validate import validate
    from headgate.data.templates import encode
    from headgate.data.tokenizers import tokenizer_of

    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four pens."}]
    path = json_lines(
        tmp_path / "chat.jsonl",
        [{"messages": [{"role": "user", "content": f"{n}?"}, turns[1]]} for n in range(40)],
    )
    made = draft(path, "embedded")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(made.text)
    validate(recipe)
    assert "valid" in capsys.readouterr().out
    tokenizer = tokenizer_of("embedded")
    tokenizer.chat_template = load_recipe(recipe).data.chat_template
    row = encode({"messages": turns}, tokenizer)
    learned = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learned).strip() == "Four pens." + tokenizer.eos_token
    # verified with the recipe's template, trained (it lies with what was saved) or not (nothing was saved)
    for steps in (0, 1):
        changes = [f"training.max_steps={steps}", f"output_dir={tmp_path}", "model.device=cpu"]
        directory = run(load_recipe(recipe, changes))
        assert directory.verified and directory.result()["evaluation"]["held_out"]["loss"] > 0
    assert load(directory.path, device="cpu")[1].chat_template == load_recipe(recipe).data.chat_template
    assert (
        "chat_template"
        not in draft(json_lines(tmp_path / "plain.jsonl", [{"text": "a b"}] * 40), "embedded").content["data"]
    )
