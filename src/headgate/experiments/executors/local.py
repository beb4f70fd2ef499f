"""A pool of processes on this machine, with CPU threads and GPUs dealt out to its slots."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch

from headgate.errors import ConfigError
from headgate.experiments.executors import Event, Task
from headgate.experiments.executors.process import start, stop

POLL_SECONDS = 0.2


class LocalExecutor:
    """``workers`` runs at a time: one a GPU where there are GPUs, else one a core.

    Each gets its share of the cores as OpenMP threads (unless OMP_NUM_THREADS is set) and one GPU, in turn. Two
    runs of one thread finish earlier than one run of two: small models do not keep two threads busy.
    """

    def __init__(self, workers: int | None = None, options: Mapping[str, object] | None = None) -> None:
        if options:
            raise ConfigError(f"executor local takes no options, got {', '.join(options)}")
        if workers is not None and workers < 1:
            raise ConfigError(f"--workers {workers}: give at least one")
        self.gpus = _gpus()
        cores = os.cpu_count() or 1
        self.workers = workers or len(self.gpus) or cores
        self.threads = max(1, cores // self.workers)

    def _environment(self, slot: int) -> dict[str, str]:
        given = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            given["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return given

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        waiting, slots = deque(tasks), list(range(self.workers))
        running: dict[int, tuple[Task, subprocess.Popen[bytes]]] = {}
        ticked = time.monotonic()
        try:
            while waiting or running:
                while waiting and slots:
                    slot, task = slots.pop(0), waiting.popleft()
                    running[slot] = (task, start(task, self._environment(slot)))
                    yield Event("started", task)
                time.sleep(POLL_SECONDS)
                for slot, (task, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        slots.append(slot)
                        yield Event("ended", task, lost=process.returncode < 0)
                if time.monotonic() - ticked >= 1:
                    ticked = time.monotonic()
                    yield Event("tick")
        finally:
            stop(process for _, process in running.values())


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]
