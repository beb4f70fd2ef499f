"""Where the runs of a sweep are executed: processes of this machine, a Ray cluster, a SLURM array.

An executor starts one process per run (``experiments.worker``) and says when it started and ended. What a run
achieved is read from its run directory, so an executor that loses a worker loses nothing but that run.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from headgate.errors import ConfigError

LOCATIONS = {"local": "LocalExecutor", "ray": "RayExecutor", "slurm": "SlurmExecutor"}


@dataclass(frozen=True)
class Task:
    """One run: its id, the resolved recipe it reads, the log that its process writes."""

    key: str
    recipe_file: Path
    log: Path


@dataclass(frozen=True)
class Event:
    """``started`` and ``ended`` speak of a task; ``tick`` comes about once a second, to redraw by.

    ``lost``: the process ended by a signal, or with its worker: the run did nothing wrong and may be tried again.
    """

    kind: Literal["started", "ended", "tick"]
    task: Task | None = None
    lost: bool = False


class Executor(Protocol):
    """``run`` yields events until every task has ended; closing the iterator stops what still runs."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]: ...


def make_executor(name: str, workers: int | None, options: Mapping[str, Any]) -> Executor:
    """The executor called ``name``. Raises ConfigError for an unknown one, or one whose extra is not installed."""
    if name not in LOCATIONS:
        raise ConfigError(f"executor {name!r} is unknown: choose from {', '.join(LOCATIONS)}")
    try:
        module = importlib.import_module(f"headgate.experiments.executors.{name}")
    except ImportError as error:
        raise ConfigError(
            f"executor {name!r} needs {error.name}: pip install 'headgate[{name}]', or use --executor local"
        ) from None
    executor: Executor = getattr(module, LOCATIONS[name])(workers, options)
    return executor
