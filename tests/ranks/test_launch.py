"""Ranks as users start them: ``--nproc`` and torchrun, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from headgate.experiments.run_directory import RunDirectory
from tests.faults.runs import recipe_of

COMMAND = "headgate.cli.main"
LONG = (
    "--set",
    "training.max_steps=4000",
    "--set",
    "training.save_every=500",
    "--set",
    "training.eval_every=4000",
)


def start(recipe: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *launcher, *(("-m",) if launcher else ()), COMMAND, "train", str(recipe)]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def only_run(recipe: Path) -> RunDirectory:
    (made,) = (recipe.parent / "runs" / "fault").glob("*/recipe.yaml")
    return RunDirectory(made.parent)


def in_training(process: subprocess.Popen[str], recipe: Path) -> dict[int, psutil.Process]:
    """Wait until steps are being taken; the processes of the ranks by number."""
    for _ in range(1200):
        if any(path.stat().st_size > 500 for path in recipe.parent.glob("runs/fault/*/metrics.jsonl")):
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child for child in children if COMMAND in " ".join(child.cmdline())}


def test_nproc(tmp_path: Path) -> None:
    recipe = recipe_of("lora", tmp_path)
    process = start(recipe, "--nproc", "2")
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    directory = only_run(recipe)
    assert directory.status == "complete" and directory.verified
    assert directory.environment()["hardware"]["ranks"] == 2
    assert text.count("run directory:") == 1 and text.count("step 6/6  loss") == 1
    assert "ranks      2, 2 examples a step on each" in text and "4 examples a step" in text


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    recipe = recipe_of("lora", tmp_path)
    launcher = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
    process = start(recipe, launcher=launcher)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert only_run(recipe).verified


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "rank 0", "rank 1", "everybody"])
def test_a_stop_saves(whom: str, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches everybody at once, and the launcher passes it on besides."""
    recipe = recipe_of("lora", tmp_path)
    process = start(recipe, "--nproc", "2", *LONG)
    ranks = in_training(process, recipe)
    if whom == "everybody":
        os.killpg(process.pid, signal.SIGINT)
    else:
        told = process if whom == "launcher" else ranks[int(whom[-1])]
        told.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert text.count("stopped at step") == 1, text
    directory = only_run(recipe)
    assert directory.status == "partial" and directory.resumable
    assert "Traceback" not in text and "error" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_with_one_message(rank: int, tmp_path: Path) -> None:
    recipe = recipe_of("lora", tmp_path)
    process = start(recipe, "--nproc", "2", *LONG)
    in_training(process, recipe)[rank].kill()
    text, _ = process.communicate(timeout=120)
    assert process.returncode in (1, 137), text
    assert text.count("error:") == 1 and "another rank ended without saying why" in text, text
    assert "Traceback" not in text
