"""Runs as Ray tasks: on a local Ray, or on the cluster that ``RAY_ADDRESS`` or ``address=`` names.

The run directories must lie on a file system that every node sees.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.exceptions

from headgate.errors import ConfigError
from headgate.experiments.executors import Event, Task
from headgate.experiments.executors.process import start, stop

OPTIONS = ("address", "num_cpus", "num_gpus")


class RayExecutor:
    """Each run asks Ray for ``num_cpus`` (1) and ``num_gpus`` (0); ``workers`` caps how many are in flight.

    Without an address a Ray of this machine is started, with ``workers`` CPUs where given.
    """

    def __init__(self, workers: int | None = None, options: Mapping[str, Any] | None = None) -> None:
        given = dict(options or {})
        for key in given:
            if key not in OPTIONS:
                raise ConfigError(f"executor ray has no option {key!r}: it takes {', '.join(OPTIONS)}")
        self.workers = workers
        self.address = given.get("address") or os.environ.get("RAY_ADDRESS")
        self.resources = {
            "num_cpus": float(given.get("num_cpus", 1)),
            "num_gpus": float(given.get("num_gpus", 0)),
        }

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        started_here = not ray.is_initialized()
        if started_here:
            ray.init(
                address=self.address,
                include_dashboard=None if self.address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                num_cpus=None if self.address else self.workers or os.cpu_count(),
            )
        # a lost worker is ours to try again: Ray's own retries would hide it from the table
        remote = ray.remote(max_retries=0, **self.resources)(_execute)  # type: ignore[call-overload]  # its keys are checked when made
        waiting = list(tasks)
        in_flight: dict[Any, Task] = {}
        limit = self.workers or len(waiting)
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < limit:
                    task = waiting.pop(0)
                    in_flight[remote.remote(task)] = task
                    yield Event("started", task)
                done, _ = ray.wait(list(in_flight), num_returns=1, timeout=1.0)
                for reference in done:
                    task = in_flight.pop(reference)
                    try:
                        lost = ray.get(reference) < 0
                    except ray.exceptions.RayError:
                        lost = True
                    yield Event("ended", task, lost=lost)
                if not done:
                    yield Event("tick")
        finally:
            for reference in in_flight:
                ray.cancel(reference)
            if in_flight:
                ray.wait(list(in_flight), num_returns=len(in_flight), timeout=60)
            if started_here:
                ray.shutdown()


def _execute(task: Task) -> int:
    """In a Ray worker: the run as a child process, stopped with it."""
    process = start(task)
    try:
        return process.wait()
    finally:
        stop([process])
