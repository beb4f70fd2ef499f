"""Where the runs of a sweep are executed: processes of this machine, a Ray cluster, a SLURM array.

An executor starts one process per run (``experiments.worker``) and says when it started and ended. What a run
achieved is read from its run directory, so an executor that loses a worker loses nothing but that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from headgate.errors import ConfigError
from headgate.plugins import Registry


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


EXECUTORS: Registry[Callable[[int | None, Mapping[str, object]], Executor]] = Registry(
    "executor",
    "headgate.executors",
    {
        "local": "headgate.experiments.executors.local:LocalExecutor",
        "ray": "headgate.experiments.executors.ray:RayExecutor",
        "slurm": "headgate.experiments.executors.slurm:SlurmExecutor",
    },
)
"""An executor is made from the number of workers (None: as many as fit) and its ``--option key=value``."""


def make_executor(name: str, workers: int | None, options: Mapping[str, object]) -> Executor:
    """The executor called ``name``. Raises ConfigError for an unknown one, or one whose extra is not installed."""
    try:
        made = EXECUTORS.get(name)
    except ImportError as error:
        raise ConfigError(
            f"executor {name!r} needs {error.name}: pip install 'headgate[{name}]', or use --executor local"
        ) from None
    return made(workers, options)
