"""Sweeps: idempotent, in parallel, and the same table whatever was killed on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from headgate.errors import CheckpointError, ConfigError, HeadgateError, RunBusy
from headgate.experiments.executors import Event, Task, make_executor
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import dump_recipe, parse_yaml, recipe_from
from headgate.experiments.run import run
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.sweep import Sweep, expand
from headgate.experiments.sweep_table import results_only


def recipe(folder: Path, **changes: Any) -> Recipe:
    return recipe_from(
        {
            "name": "swept",
            "output_dir": str(folder),
            "model": {"name_or_path": "random:llama", "device": "cpu"},
            "lora": {"dropout": 0.1},
            "data": {
                "train": {"source": "wordmath", "limit": 40},
                "validation": {"source": "wordmath", "split": "validation", "limit": 4},
                "max_length": 128,
            },
            "training": {"max_steps": 3, "per_device_train_batch_size": 2, "save_every": 1, "eval_every": 3},
            "evaluation": [{"task": "perplexity", "source": "wordmath", "limit": 4, "lengths": [128]}],
            "sweep": {"grid": {"seed": [1, 2], "training.learning_rate": [1e-3, 1e-2]}},
            **changes,
        }
    )


class InProcess:
    """Runs the tasks here, one after the other; the first ``lost_once`` of them are lost."""

    def __init__(self, lost_once: int = 0) -> None:
        self.executed: list[str] = []
        self.lost = lost_once

    def run(self, tasks: list[Task]) -> Any:
        for task in tasks:
            yield Event("started", task)
            self.executed.append(task.key)
            lost = self.lost > 0
            self.lost -= lost
            if not lost:
                try:
                    run(recipe_from(parse_yaml(task.recipe_file.read_text(), "task")))
                except HeadgateError as error:
                    task.log.parent.mkdir(exist_ok=True)
                    task.log.write_text(f"error: {error}\n")
            yield Event("ended", task, lost=lost)


def test_a_grid_is_every_combination_and_equal_runs_are_one(tmp_path: Path) -> None:
    runs = expand(recipe(tmp_path))
    assert [(r.recipe.seed, r.recipe.training.learning_rate) for r in runs] == [
        (1, 1e-3), (1, 1e-2), (2, 1e-3), (2, 1e-2),
    ]  # fmt: skip
    listed = recipe(tmp_path, sweep={"runs": [{}, {"seed": 42}, {"training.max_steps": 2}]})
    assert [r.label for r in expand(listed)] == ["defaults", "max_steps=2"], "seed 42 is the default"
    both = recipe(tmp_path, sweep={"grid": {"seed": [1, 2]}, "runs": [{}, {"training.max_steps": 2}]})
    assert len(expand(both)) == 4


def test_an_override_may_change_the_preset_of_a_method(tmp_path: Path) -> None:
    """The overridden block is what the user wrote, not the defaults of the old preset written out."""
    swept = recipe(
        tmp_path,
        methods={"schema_bank": {"tags": "keyword"}},
        sweep={"runs": [{"methods.schema_bank.preset": "released"}]},
    )
    (one,) = expand(swept)
    alone = recipe(tmp_path, methods={"schema_bank": {"tags": "keyword", "preset": "released"}})
    assert one.recipe.methods == alone.methods


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (None, "sweeps nothing"),
        ({"grid": {}}, "sweeps nothing"),
        ({"grid": {"seed": []}}, "sweep.grid.seed is empty"),
        ({"grid": {"training.lerning_rate": [1.0]}}, "did you mean 'learning_rate'"),
        ({"grid": {"seed.a": [1]}}, "seed: should be a valid integer"),
    ],
)
def test_a_bad_sweep_is_refused_before_any_run(tmp_path: Path, sweep: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sweep(recipe(tmp_path, sweep=sweep))
    assert not list(tmp_path.iterdir())


def test_complete_runs_are_skipped_and_lost_ones_tried_again(tmp_path: Path) -> None:
    first = InProcess(lost_once=1)
    table = Sweep(recipe(tmp_path)).execute(first)
    assert len(first.executed) == 5, "four runs, one of them twice"
    assert [row["status"] for row in table["runs"]] == ["complete"] * 4
    assert [group["n"] for group in table["groups"]] == [2, 2]
    mean = table["groups"][0]["mean"]["evaluation.perplexity_wordmath.loss"]
    own = [row["metrics"]["evaluation.perplexity_wordmath.loss"] for row in table["runs"]]
    assert mean == pytest.approx((own[0] + own[2]) / 2)
    second = InProcess()
    assert Sweep(recipe(tmp_path)).execute(second) == table and second.executed == []
    folder = Sweep(recipe(tmp_path)).folder
    assert (folder / "sweep.csv").read_text().count(",complete,") == 4
    assert "learning_rate=0.001" in (folder / "sweep.md").read_text()


def test_a_failed_run_is_listed_and_costs_only_itself(tmp_path: Path) -> None:
    swept = recipe(tmp_path, sweep={"grid": {"data.max_length": [128, 9]}})
    told: list[str] = []
    table = Sweep(swept, say=told.append).execute(InProcess())
    good, bad = table["runs"]
    assert good["status"] == "complete" and bad["status"] == "failed" and "max_length" in bad["error"]
    again = InProcess()
    Sweep(swept).execute(again)
    assert len(again.executed) == 1, "only the failed run is tried again"
    assert "max_length=9: failed" in (Sweep(swept).folder / "sweep.md").read_text()


def test_a_sweep_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    sweep = Sweep(recipe(tmp_path))
    sweep.open()
    (sweep.folder / "planned.json").write_text(json.dumps({"runs": ["somebody-elses"]}))
    with pytest.raises(CheckpointError, match="another recipe's sweep"):
        sweep.execute(InProcess())


def test_a_run_directory_has_one_writer(tmp_path: Path) -> None:
    one = recipe(tmp_path, sweep=None)
    with RunDirectory.of(one).held(), pytest.raises(RunBusy, match="another process"):
        run(one)
    assert run(one).status == "complete"


def test_executors_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ConfigError, match="installed are local, ray, slurm"):
        make_executor("kubernetes", None, {})
    with pytest.raises(ConfigError, match="no options"):
        make_executor("local", None, {"partition": "gpu"})
    with pytest.raises(ConfigError, match="at least one"):
        make_executor("local", 0, {})
    with pytest.raises(ConfigError, match="no option 'gpus'"):
        make_executor("ray", None, {"gpus": 1})
    with pytest.raises(ConfigError, match="no sbatch"):
        make_executor("slurm", None, {})


def killed_sweep(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The table of a sweep that was killed at a random moment, restarted, and one of whose runs was killed."""
    steps = {"max_steps": 12, "per_device_train_batch_size": 2, "save_every": 2, "eval_every": 12}
    swept = recipe(folder, training=steps, sweep={"grid": {"seed": [1, 2, 3]}})
    file = folder / "sweep.yaml"
    file.write_text(dump_recipe(swept))
    command = [sys.executable, "-m", "headgate.cli.main", "sweep", str(file), "--workers", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)

    def workers() -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "headgate.experiments.worker" in (process.info["cmdline"] or [])
            and str(folder) in process.info["cmdline"][-1]
        ]

    def wait_for_workers(process: subprocess.Popen[bytes]) -> None:
        while not workers() and process.poll() is None:
            time.sleep(0.1)

    chance = random.Random()
    first = begin()
    wait_for_workers(first)
    time.sleep(chance.uniform(0, 8))
    os.killpg(first.pid, signal.SIGKILL)
    second = begin()
    wait_for_workers(second)
    time.sleep(chance.uniform(0, 4))
    for victim in workers()[:1]:
        victim.kill()
    second.wait(300)
    table = json.loads((Sweep(swept).folder / "sweep.json").read_text())
    return results_only(table)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    steps = {"max_steps": 12, "per_device_train_batch_size": 2, "save_every": 2, "eval_every": 12}
    swept = recipe(
        tmp_path_factory.mktemp("undisturbed"), training=steps, sweep={"grid": {"seed": [1, 2, 3]}}
    )
    return results_only(Sweep(swept).execute(InProcess()))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--executor", "ray"),
        pytest.param(("--executor", "slurm", "--option", "cluster=local"), marks=pytest.mark.slow),
    ],
)
def test_kill_9_and_restart_give_the_undisturbed_table(
    tmp_path: Path, undisturbed: list[dict[str, Any]], options: tuple[str, ...]
) -> None:
    assert killed_sweep(tmp_path, *options) == undisturbed
    assert [row["status"] for row in undisturbed] == ["complete"] * 3
