"""What starts without torch: help, lists, and every error that a recipe alone can have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from headgate.errors import Stopped
from headgate.methods.names import METHODS, SETTINGS, config_class
from headgate.methods.registry import method_class

HEAVY = ("torch", "transformers", "peft", "datasets", "pyarrow", "scipy", "matplotlib")
SAY = f"""
import atexit, importlib.metadata, sys
atexit.register(lambda: print("imported", *[m for m in {HEAVY!r} if m in sys.modules]))
offered = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **asked: (  # methods of other packages come with what they import
    [] if asked.get("group", "").startswith("headgate.") else offered(**asked)
)
from headgate.cli.main import main
main()
"""


def imported(*arguments: str, cwd: Path) -> tuple[int, str, list[str]]:
    """Exit code, stderr, and which of the heavy packages the command imported."""
    done = subprocess.run(
        [sys.executable, "-c", SAY, *arguments],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1].split()
    assert last[0] == "imported", done.stderr
    return done.returncode, done.stderr, last[1:]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["recipes"], ["recipes", "show", "demo/gate"], ["schema"]]
)
def test_lists_need_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code, said, packages = imported(*arguments, cwd=tmp_path)
    assert (code, packages) == (0, []), said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "nope.yaml"], "nope.yaml does not exist"),
        (["train", "wordmath/lora", "--set", "training.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["validate", "wordmath/lora", "--set", "seed=-1"], "seed"),
        (["sweep", "wordmath/lora", "--set", "model.dtype=float7"], "model.dtype"),
        (["probe", "wordmath/lora", "--set", "methods={backward_gat: {}}"], "did you mean 'backward_gate'"),
        (["data", "wordmath/lora", "--set", "data.max_length=long"], "data.max_length"),
        (["train", "wordmath/lora", "--set", "methods={layer_routing: {target_utilisation: 1}}"], "did you mean 'target_utilization'"),
        (["train", "wordmath/lora", "--set", "methods={schema_bank: {top_k: 99}}"], "top_k"),
        (["train", "wordmath/lora", "--set", "methods={lora_experts: {spawn: {policy: nvelty}}}"], "did you mean 'novelty'"),
        (["train", "wordmath/lora", "--set", "methods={backward_gate: {target_acceptance: 2}}"], "target_acceptance"),
        (["compare", "demo/gate", "--set", "compare.arms.b.lora.r=none"], "compare.arms.b"),
        (["validate", "demo/gate", "--set", "compare.arms.b.lora.r=none"], "compare.arms.b"),
    ],
)  # fmt: skip
def test_an_error_of_a_recipe_is_told_before_torch_is_imported(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    code, said, packages = imported(*arguments, cwd=tmp_path)
    assert code == 2
    assert expected in said and said.startswith("error: ") and "Traceback" not in said
    assert packages == []


@pytest.mark.parametrize("compared", [False, True])
def test_a_recipe_over_lines_of_json_is_validated_without_torch(compared: bool, tmp_path: Path) -> None:
    """Rows, columns, golds, adapter, memory and every arm: over a model of the Llama kind names and sizes say it all."""
    rows = [{"question": f"{n} and {n}?", "answer": f"They are {2 * n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "source": "jsonl",
        "path": "rows.jsonl",
        "columns": {"prompt": "question", "completion": "answer"},
    }
    source["options"] = {"validation_share": 0.2}
    scored = {**source["columns"], "answer": "answer"}
    content: dict[str, Any] = {
        "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers": "last_2"},
        "data": {"train": source, "validation": source},
        "evaluation": [{"task": "exact_match", **source, "columns": scored, "split": "validation"}],
    }
    if compared:
        arms = {"lora": {}, **{name: {"methods": {name: {}}} for name in SETTINGS}}
        content["compare"] = {"arms": arms}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    code, said, packages = imported("validate", "recipe.yaml", cwd=tmp_path)
    assert (code, packages) == (0, []), said


def test_a_rank_above_every_weight_is_refused_without_torch(tmp_path: Path) -> None:
    code, said, packages = imported("validate", "wordmath/lora", "--set", "lora.r=4096", cwd=tmp_path)
    assert (code, packages) == (2, []) and "lora.r=4096 exceeds 128" in said


@pytest.mark.parametrize(("stop", "said"), [(KeyboardInterrupt, "interrupted\n"), (Stopped, "")])
def test_ctrl_c_in_a_verb_is_told_once(
    stop: type[KeyboardInterrupt],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """typer alone would end with 130 and without a word; a run that has saved has said so itself."""
    from headgate.cli import info, main

    def pressed() -> None:
        raise stop

    monkeypatch.setattr(info, "json_schema", pressed)
    monkeypatch.setattr(sys, "argv", ["headgate", "schema"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130 and capsys.readouterr().err == said


@pytest.mark.parametrize("name", METHODS.names())
def test_settings_are_those_of_the_method(name: str) -> None:
    """The short cut to the settings, which leaves the method out, leads to the class that the method uses."""
    assert config_class(name) is method_class(name).Config


def test_every_method_of_ours_has_the_short_cut() -> None:
    assert set(SETTINGS) == set(METHODS._builtin)


def test_names_of_policies_are_those_that_exist() -> None:
    from headgate.methods.lora_experts.spawn import POLICIES
    from headgate.methods.lora_experts.spawn_config import POLICY_NAMES

    assert sorted(POLICIES) == sorted(POLICY_NAMES)
