"""Runs as a SLURM job array through submitit; a preempted or timed-out job is requeued and resumes.

``cluster=local`` runs submitit's own local executor, which needs no SLURM.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence

import submitit

from headgate.errors import ConfigError
from headgate.experiments.executors import Event, Task
from headgate.experiments.executors.process import start, stop

POLL_SECONDS = 1.0


class SlurmExecutor:
    """``options`` are submitit's parameters: ``slurm_partition``, ``timeout_min``, ``gpus_per_node``, ``cpus_per_task``...

    ``workers`` caps how many jobs of the array run at once. The run directories must lie on a shared file system.
    """

    def __init__(self, workers: int | None = None, options: Mapping[str, object] | None = None) -> None:
        self.workers, self.options = workers, dict(options or {})
        self.cluster = str(self.options.pop("cluster", "slurm"))
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError(
                "executor slurm: there is no sbatch on this machine: submit from a login node, "
                "or use --executor local (--option cluster=local runs submitit without SLURM)"
            )

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        if not tasks:
            return
        folder = tasks[0].log.parent / "submitit"
        executor = submitit.AutoExecutor(folder=str(folder), cluster=self.cluster)
        limits = {"slurm_array_parallelism": self.workers} if self.workers and self.cluster == "slurm" else {}
        try:
            executor.update_parameters(name="headgate", **limits, **self.options)
        except (NameError, TypeError, ValueError) as error:
            raise ConfigError(f"executor slurm: {str(error).splitlines()[0]}") from None
        jobs = dict(zip(executor.map_array(_Run(), tasks), tasks, strict=True))
        running: set[submitit.Job[int]] = set()
        try:
            while jobs:
                for job, task in list(jobs.items()):
                    if job not in running and job.state == "RUNNING":
                        running.add(job)
                        yield Event("started", task)
                    if job.done():
                        del jobs[job]
                        yield Event("ended", task, lost=job.exception() is not None)
                yield Event("tick")
                time.sleep(POLL_SECONDS if jobs else 0)
        finally:
            for job in jobs:
                job.cancel()


class _Run:
    """What a job executes. submitit calls ``checkpoint`` before a preemption or time-out and requeues its result."""

    def __call__(self, task: Task) -> int:
        self.process = start(task)
        try:
            return self.process.wait()
        finally:
            stop([self.process])

    def checkpoint(self, task: Task) -> submitit.helpers.DelayedSubmission:
        stop([self.process])  # the run saves; the requeued job resumes it
        return submitit.helpers.DelayedSubmission(_Run(), task)
