"""Every state file x missing, empty, cut, garbage, one bit: the run goes on from an older checkpoint and ends as it should,
or says in one line what is wrong and what to do. Nothing is half believed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headgate.errors import HeadgateError
from headgate.experiments.listing import list_runs
from headgate.experiments.run_directory import RunDirectory
from headgate.training.saved import load

from .runs import attempt, differences, directory_of, outcome, recipe_of


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": half,
    "garbage": lambda path: path.write_bytes(b"\x00\xff not what was here \x80" * 7),
    "one_bit": one_bit,
}
PARTIAL = [
    "recipe.yaml",
    "env.json",
    "inputs.json",
    "metrics.jsonl",
    *(
        f"trainer/checkpoint-4/{name}"
        for name in (
            "manifest.json", "headgate.json", "headgate.safetensors", "adapter_model.safetensors", "optimizer.pt",
            "scheduler.pt", "trainer_state.json", "rng_state.pth",
        )
    ),
]  # fmt: skip
COMPLETE = [
    "result.json",
    "manifest.json",
    "recipe.yaml",
    "env.json",
    "inputs.json",
    "metrics.jsonl",
    "predictions/perplexity_wordmath.jsonl",
    *(
        f"checkpoint/{name}"
        for name in ("manifest.json", "headgate.json", "adapter_model.safetensors", "tokenizer.json")
    ),
]
QUICK = {
    ("manifest.json", "empty"), ("result.json", "empty"), ("result.json", "half"), ("result.json", "one_bit"),
    ("recipe.yaml", "empty"), ("trainer/checkpoint-4/manifest.json", "empty"), ("metrics.jsonl", "garbage"),
    ("trainer/checkpoint-4/trainer_state.json", "half"), ("inputs.json", "half"), ("checkpoint/headgate.json", "one_bit"),
}  # fmt: skip


def cases(files: list[str]) -> list[Any]:
    return [
        pytest.param(file, damage, marks=[] if (file, damage) in QUICK else [pytest.mark.slow])
        for file in files
        for damage in DAMAGES
    ]


@pytest.fixture(scope="session")
def partial(tmp_path_factory: pytest.TempPathFactory, undisturbed: Any) -> Path:
    """A run killed after its second checkpoint."""
    folder = tmp_path_factory.mktemp("partial")
    recipe = recipe_of("lora", folder)
    _, events = undisturbed("lora")
    for at in range(events // 2, events):
        attempt(recipe, at=at)
        if (directory_of(recipe).trainer_dir / "checkpoint-4" / "manifest.json").exists():
            return folder
    raise AssertionError("never reached its second checkpoint")


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complete")
    assert attempt(recipe_of("lora", folder))["exit"] == 0
    return folder


def copied(source: Path, target: Path) -> tuple[Path, RunDirectory]:
    recipe = recipe_of("lora", target)
    made = directory_of(source / "recipe.yaml").path
    shutil.copytree(made, directory_of(recipe).path)
    return recipe, directory_of(recipe)


@pytest.mark.parametrize(("file", "damage"), cases(PARTIAL))
def test_a_torn_file_of_a_partial_run(
    file: str,
    damage: str,
    partial: Path,
    undisturbed: Any,
    tmp_path: Path,
) -> None:
    recipe, directory = copied(partial, tmp_path)
    DAMAGES[damage](directory.path / file)
    done = attempt(recipe)
    if done["exit"] == 0:
        assert not (found := differences(undisturbed("lora")[0], outcome(recipe))), found
    else:
        assert done["exit"] == 3 and file.split("/")[-1] in done["error"] and "\n" not in done["error"], done
        assert "--fresh" in done["error"], "says the cure"


@pytest.mark.parametrize(("file", "damage"), cases(COMPLETE))
def test_a_torn_file_of_a_complete_run(
    file: str,
    damage: str,
    complete: Path,
    undisturbed: Any,
    tmp_path: Path,
) -> None:
    """Listing still lists, loading refuses what has changed, ``verify`` names it, and running again mends or refuses."""
    recipe, directory = copied(complete, tmp_path)
    DAMAGES[damage](directory.path / file)
    assert len(list_runs(tmp_path, [])) == 1
    if file.startswith("checkpoint/"):
        with pytest.raises(HeadgateError):
            load(directory.path)
    done = attempt(recipe)
    if (
        done["exit"] == 0
        and directory.status == "complete"
        and not file.startswith(("checkpoint/", "predictions/"))
    ):
        after = outcome(recipe)
        if file in ("result.json", "manifest.json"):
            wanted = undisturbed("lora")[0]
            assert after["result"] == wanted["result"] and after["tensors"] == wanted["tensors"]
    elif done["exit"] == 0:
        assert directory.status == "complete"
    else:
        assert done["exit"] == 3 and "\n" not in done["error"], done
        assert file.split("/")[-1] in done["error"] or directory.path.name in done["error"], done


@pytest.mark.parametrize("file", ["result.json", "predictions/perplexity_wordmath.jsonl", "metrics.jsonl"])
def test_verify_names_a_changed_file_and_exits_with_1(file: str, complete: Path, tmp_path: Path) -> None:
    _, directory = copied(complete, tmp_path)
    command = [sys.executable, "-m", "headgate.cli.main", "verify", str(directory.path)]
    whole = subprocess.run(command, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    content = (directory.path / file).read_text()
    (directory.path / file).write_text(content.replace("1", "2", 1))
    changed = subprocess.run(command, capture_output=True, text=True)
    assert changed.returncode == 1 and file in changed.stdout, changed.stdout


def test_a_null_line_in_the_metrics_is_no_row(complete: Path, tmp_path: Path) -> None:
    _, directory = copied(complete, tmp_path)
    rows = directory.metrics()
    with directory.metrics_file.open("a") as file:
        file.write('null\n[1, 2]\n\n{"loss": 1}\n{"step": ')
    assert directory.metrics() == rows
