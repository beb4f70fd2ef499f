"""One run as a process of its own, which stops itself when whoever started it is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping

from headgate.experiments.executors import Task


def start(task: Task, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start ``experiments.worker`` for a task, its output in the task's log.

    The worker holds the reading end of a pipe: when this process dies, even by SIGKILL, the pipe closes and the
    worker saves a checkpoint and stops. Its own session keeps a Ctrl-C of the terminal from reaching it twice.
    """
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "headgate.experiments.worker", str(task.recipe_file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )


def stop(processes: Iterable[subprocess.Popen[bytes]], patience: float = 60.0) -> None:
    """Ask workers, once each, to save and end; kill those that do not within ``patience`` seconds."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    for process in alive:
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
