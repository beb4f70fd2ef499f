"""inspect, runs, diff, cite: looking at what runs left behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from .test_cli import here, recipe, run_directory


@pytest.fixture(scope="module")
def banked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banked")
    options = {"num_schemas": 4, "rank": 2, "tags": "keyword"}
    done = here("train", recipe(folder, methods={"schema_bank": options}, training__max_steps=8))
    assert done.returncode == 0, done.stderr
    return folder


def test_inspect_says_what_each_schema_does(banked: Path) -> None:
    run = run_directory(banked)
    done = here("inspect", run, "--limit", 24)
    assert done.returncode == 0, done.stderr
    blocks = json.loads((run / "inspect" / "schema_bank.json").read_text())["blocks"]
    assert len(blocks) == 2
    for block in blocks:
        assert sum(block["load"]) == pytest.approx(1, abs=1e-4)
        assert block["nmi"] is not None and block["reuse"] is not None and 0 <= block["reuse"] <= 2
    for suffix in ("png", "svg"):
        assert (run / "inspect" / f"schema_bank.{suffix}").stat().st_size > 1000


def test_inspecting_a_run_without_methods_is_an_error(tmp_path: Path) -> None:
    assert here("train", recipe(tmp_path, training__max_steps=1)).returncode == 0
    done = here("inspect", run_directory(tmp_path))
    assert done.returncode == 2 and "trained no method" in done.stderr


def test_runs_diff_and_cite(banked: Path, tmp_path: Path) -> None:
    run = run_directory(banked)
    table = tmp_path / "runs.csv"
    done = here("runs", banked, "--where", "status=complete", "--csv", table)
    assert done.returncode == 0 and run.name in done.stdout
    (row,) = csv.DictReader(table.open())
    result = json.loads((run / "result.json").read_text())
    assert float(row["training.eval_loss"]) == result["training"]["eval_loss"]
    assert "no run below" in here("runs", banked, "--where", "status=failed").stdout
    assert here("train", recipe(tmp_path, seed=7, training__max_steps=1)).returncode == 0
    shown = here("diff", run, run_directory(tmp_path)).stdout
    assert "seed: 42 | 7" in shown and "training.max_steps: 8 | 1" in shown
    cited = here("cite", run).stdout
    assert "schemabank2025" in cited and "headgate2026" in cited
    assert here("cite", tmp_path).returncode == 1


def test_inspect_draws_depth_over_text_and_chats(tmp_path: Path) -> None:
    """Rows of text and of messages have no prompt; texts longer than the context are read as far as it goes."""
    rows = {
        "text": {"text": "A long tale of a fox and a hen. " * 60},
        "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well met."}]},
    }  # fmt: skip
    for kind, row in rows.items():
        (tmp_path / kind).mkdir()
        file = tmp_path / f"{kind}.jsonl"
        file.write_text((json.dumps(row) + "\n") * 3)
        source = {"source": kind, "path": str(file)}
        data = {"train": source, "validation": None, "max_length": 256, "loss_on": "all"}
        data |= {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
        methods = {"layer_routing": {"granularity": "token", "kd": False}}
        done = here("train", recipe(tmp_path / kind, data=data, methods=methods, training__max_steps=2, evaluation=[]))  # fmt: skip
        assert done.returncode == 0, done.stderr
        run = run_directory(tmp_path / kind)
        done = here("inspect", run, "--limit", 2)
        assert done.returncode == 0, done.stderr
        found = json.loads((run / "inspect" / "layer_routing.json").read_text())
        assert found["texts"] and all(len(t["tokens"]) == len(t["depth"]) for t in found["texts"])
        assert (run / "inspect" / "layer_routing_tokens.svg").stat().st_size > 1000
        assert "<span" in (run / "inspect" / "layer_routing_text.html").read_text()
