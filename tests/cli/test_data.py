"""``headgate sources``, ``headgate data`` and what ``headgate validate`` says of data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.errors import ConfigError, DataError


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(command_line(arguments[0]), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"q": f"What is {i}?", "a": f"{i} it is"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (
        "{source: prompt_completion, path: %s, columns: {prompt: '{q}\\n', completion: a}, weight: 3}"
        % (tmp_path / "rows.jsonl")
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data:\n  train: [{source}, {{source: wordmath, limit: 20}}]\n  validation: null\n".replace(
            "\\n", "\\n"
        )
    )
    return path


def test_data_shows_what_is_trained_and_the_mix(recipe: Path) -> None:
    shown = invoke("data", str(recipe), "--rows", "1")
    assert "75.0% of the rows drawn" in shown and "«0 it is<eos>»" in shown
    assert "masks decoded and compared" in shown and "30 rows" in shown


def test_sources_lists_and_shows_one() -> None:
    assert "narrativeqa" in invoke("sources")
    shown = invoke("sources", "math")
    assert "in:" in shown and '"answer": "2"' in shown
    with pytest.raises(DataError, match="did you mean 'gsm8k'"):
        invoke("sources", "gsm8")


def test_validate_reads_the_data(recipe: Path, tmp_path: Path) -> None:
    told = invoke("validate", str(recipe))
    assert "train.0:" in told and "completion, prompt" in told and told.rstrip().endswith("valid")
    recipe.write_text("data: {train: {source: nonsense}}\n")
    with pytest.raises(DataError, match=r"data.train: unknown source 'nonsense'"):
        invoke("validate", str(recipe))
    recipe.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        invoke("validate", str(recipe))
