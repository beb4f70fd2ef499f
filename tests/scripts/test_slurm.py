"""The shipped SLURM scripts, run by bash with stand-ins for what a cluster has: they start, stop, and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "recipes").rglob("slurm/*.sh"))
RUN = """#!/bin/bash
echo "$@" >> calls
[[ " $* " == *" --resume "* && ! -e saved ]] && exit 7  # there is no checkpoint yet
[[ -e saved ]] && exit 0
trap 'sleep 0.5; touch saved; exit 143' TERM
touch began
for _ in $(seq 200); do sleep 0.05; done
"""
CONTROL = """#!/bin/bash
[[ $1 == show ]] && echo localhost || echo "$@" >> control
"""


def started(script: Path, folder: Path) -> subprocess.Popen[bytes]:
    stand_ins = {"accelerate": RUN, "srun": RUN, "scontrol": CONTROL}
    for name, content in stand_ins.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    return subprocess.Popen(["bash", str(script)], cwd=folder, env=environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_at_its_limit_saves_is_requeued_and_goes_on(script: Path, tmp_path: Path) -> None:
    assert SCRIPTS
    job = started(script, tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job.poll() is None, "the first start asks for a checkpoint that no first start has"
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert (tmp_path / "saved").exists(), "the job ended before the run had saved"
    assert (tmp_path / "control").read_text() == "requeue 42\n"
    assert started(script, tmp_path).wait(60) == 0
