"""``sweep``: many runs from one recipe, each in a process of its own; idempotent, and none costs another.

A run that is complete is skipped, a partial one resumes, a failed one is tried again; what ran is in the table,
``sweep.json``, whenever the sweep ends.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headgate.errors import CheckpointError, ConfigError, DamagedFile
from headgate.experiments.executors import Event, Executor, Task
from headgate.experiments.paths import with_paths
from headgate.experiments.recipe import Recipe, SweepConfig
from headgate.experiments.recipe_file import dump_recipe, recipe_from, set_dotted
from headgate.experiments.records import SweepTable
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.sweep_table import describe, sweep_table, write_table
from headgate.files import read_json, write_atomically

TABLE_SECONDS = 10.0
"""How often the table is written while runs end, for a report that is read meanwhile."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: what it overrides, and the recipe that gives."""

    overrides: Mapping[str, object]
    recipe: Recipe

    @property
    def label(self) -> str:
        return describe(self.overrides)

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory.of(self.recipe)


def expand(recipe: Recipe) -> list[SweepRun]:
    """Every combination of the grid, for every entry of the list, in the order written; equal runs once.

    Raises ConfigError naming the run for a bad key, and where there is nothing to sweep.
    """
    if recipe.sweep is None:
        raise ConfigError("this recipe sweeps nothing: give sweep.grid (key: [values]) or sweep.runs")
    found: dict[str, SweepRun] = {}
    for overrides in combinations(recipe.sweep, "sweep"):
        content = recipe.written()
        for key, value in overrides.items():
            set_dotted(content, key, value)
        made = with_paths(recipe_from(content, f"sweep run {describe(overrides)}"))
        found.setdefault(made.run_id(), SweepRun(overrides, made))
    return list(found.values())


def combinations(sweep: SweepConfig, where: str) -> Iterator[dict[str, object]]:
    """Every combination of the grid, for every entry of the list. ``where`` is the section, for ConfigErrors."""
    if not (sweep.grid or sweep.runs):
        raise ConfigError(f"this recipe sweeps nothing: give {where}.grid (key: [values]) or {where}.runs")
    for key, values in sweep.grid.items():
        if not values:
            raise ConfigError(f"{where}.grid.{key} is empty: give it at least one value")
    axes = [[(key, value) for value in values] for key, values in sweep.grid.items()]
    for listed in sweep.runs or [{}]:
        for combination in itertools.product(*axes):
            yield {**dict(combination), **listed}


@dataclass
class Progress:
    """What the sweep tells while it works."""

    runs: Sequence[SweepRun]
    running: dict[str, float] = field(default_factory=dict)
    """Run id -> when it started."""
    eta: float | None = None
    """Seconds left, from the runs finished so far; None before the first."""


class Sweep:
    """One sweep on disk: ``<output_dir>/<name>/sweep-<digest>/`` beside the run directories it fills."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = lambda _line: None) -> None:
        self.recipe, self.say = recipe, say
        self.runs = expand(recipe)
        identity = json.dumps([run.recipe.run_id() for run in self.runs])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        self.folder = Path(recipe.output_dir) / recipe.name / f"sweep-{digest}"
        self.by_key = {run.recipe.run_id(): run for run in self.runs}

    def count(self, status: str) -> int:
        return sum(run.directory.status == status for run in self.runs)

    def open(self) -> None:
        """Create the folder. Raises CheckpointError where it holds another recipe's sweep."""
        planned = {"runs": list(self.by_key)}
        file = self.folder / "planned.json"
        try:
            other = file.exists() and read_json(file) != planned
        except DamagedFile:
            other = (
                False  # torn by a crash: the folder's name says which runs it holds, and it is written again
            )
        if other:
            raise CheckpointError(
                f"{self.folder} holds another recipe's sweep: choose another name or output_dir"
            )
        (self.folder / "recipes").mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(planned, indent=1))
        write_atomically(self.folder / "recipe.yaml", dump_recipe(self.recipe))

    def execute(
        self, executor: Executor, retries: int = 1, show: Callable[[Progress], None] = lambda _progress: None
    ) -> SweepTable:
        """Run what is not complete; a run whose process was killed is tried ``retries`` times more.

        Returns the table, which is also written when the sweep is interrupted.
        """
        self.open()
        todo = [key for key, run in self.by_key.items() if run.directory.status != "complete"]
        self.say(
            f"{len(self.runs)} runs: {len(self.runs) - len(todo)} complete (skipped), "
            f"{self.count('partial')} partial (resumed), {self.count('failed')} failed (tried again)"
        )
        self.write_table()  # the report of a sweep that goes on reads it
        try:
            with _sigterm_as_interrupt():
                for _ in range(1 + retries):
                    todo = self._round(executor, todo, show)
                    if not todo:
                        break
                    self.say(f"lost and tried again: {', '.join(self.by_key[key].label for key in todo)}")
        finally:
            table = self.write_table()
        return table

    def write_table(self) -> SweepTable:
        """``sweep.json``, ``.csv`` and ``.md`` from the run directories as they are."""
        table = sweep_table(
            self.recipe.name, [(run.overrides, run.directory, self.log(run)) for run in self.runs]
        )
        write_table(self.folder, table)
        return table

    def log(self, run: SweepRun) -> Path:
        """What the run's process printed."""
        return self.folder / "logs" / f"{run.recipe.run_id()}.log"

    def _round(self, executor: Executor, keys: Sequence[str], show: Callable[[Progress], None]) -> list[str]:
        """Each of ``keys`` once; the keys of those that were lost."""
        progress, lost, seconds = Progress(self.runs), [], []
        left = len(keys)
        began = noted = time.monotonic()
        for event in executor.run([self._task(key) for key in keys]):
            if event.task is not None:
                key, label = event.task.key, self.by_key[event.task.key].label
                if event.kind == "started":
                    progress.running[key] = time.monotonic()
                else:
                    left -= 1
                    seconds.append(time.monotonic() - progress.running.pop(key, time.monotonic()))
                    if self._ended(event):
                        lost.append(key)
                    progress.eta = (time.monotonic() - began) / len(seconds) * left
                    self.say(
                        f"{len(keys) - left}/{len(keys)}  {label}: {self._outcome(key)}  eta {progress.eta:.0f}s"
                    )
                    if time.monotonic() - noted > TABLE_SECONDS:
                        self.write_table()
                        noted = time.monotonic()
            show(progress)
        return lost

    def _task(self, key: str) -> Task:
        file = self.folder / "recipes" / f"{key}.yaml"
        write_atomically(file, dump_recipe(self.by_key[key].recipe))
        return Task(key, file, self.log(self.by_key[key]))

    def _ended(self, event: Event) -> bool:
        """Whether the run was lost: killed, and not complete."""
        assert event.task is not None
        return event.lost and self.by_key[event.task.key].directory.status != "complete"

    def _outcome(self, key: str) -> str:
        run = self.by_key[key]
        return (
            run.directory.status
            if run.directory.status != "new"
            else f"failed before it began ({self.log(run)})"
        )


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler's time-out) ends a sweep as Ctrl-C does: runs saved, table written."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
