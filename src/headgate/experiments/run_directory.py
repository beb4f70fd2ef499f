"""A run directory: what is in it, whether it is complete, partial, failed, or somebody else's."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from headgate.errors import CheckpointError, RunBusy
from headgate.experiments.environment import environment
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import dump_recipe, recipe_from
from headgate.training.checkpoint import checkpoints, write_atomically

Status = Literal["new", "complete", "partial", "failed"]


@dataclass(frozen=True)
class RunDirectory:
    """``<output_dir>/<name>/<run-id>``: recipe, environment, metrics, checkpoints, predictions, result."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        return cls(Path(recipe.output_dir) / recipe.name / recipe.run_id())

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def trainer_dir(self) -> Path:
        """Rolling checkpoints to resume from; emptied when the run is complete."""
        return self.path / "trainer"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    @property
    def status(self) -> Status:
        if self.result_file.exists():
            return "complete"
        if (self.path / "failed.json").exists():
            return "failed"
        return "partial" if self.recipe_file.exists() else "new"

    @property
    def resumable(self) -> bool:
        return bool(checkpoints(self.trainer_dir))

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        if not self.recipe_file.exists():
            raise CheckpointError(f"{self.path} is no run directory: it has no recipe.yaml")
        return recipe_from(yaml.safe_load(self.recipe_file.read_text()), str(self.recipe_file))

    def result(self) -> dict[str, Any]:
        """The final metrics. Raises CheckpointError for a run that has not finished."""
        if not self.result_file.exists():
            raise CheckpointError(
                f"{self.path} is {self.status}: it has no result.json; run its recipe again"
            )
        result: dict[str, Any] = json.loads(self.result_file.read_text())
        return result

    def metrics(self) -> list[dict[str, Any]]:
        """The telemetry rows so far; a line that is still being written is left out."""
        if not self.metrics_file.exists():
            return []
        text = self.metrics_file.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]

    def open(self, recipe: Recipe, *, fresh: bool = False) -> None:
        """Create or reopen for this recipe. Raises CheckpointError if the folder holds another recipe's run."""
        if self.recipe_file.exists() and not fresh and self.recipe().identity() != recipe.identity():
            raise CheckpointError(
                f"{self.path} holds a run of another recipe: choose another output_dir or name, or --fresh to replace it"
            )
        if fresh and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "failed.json").unlink(missing_ok=True)
        write_atomically(self.recipe_file, dump_recipe(recipe))
        write_atomically(self.path / "env.json", json.dumps(environment(), indent=1))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out while this one writes. Raises RunBusy where one is writing already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunBusy(
                f"{self.path} is being written by another process: wait for it, or stop it"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, last and whole; what was only needed to resume is deleted."""
        write_atomically(self.result_file, json.dumps(result, indent=1))
        shutil.rmtree(self.trainer_dir, ignore_errors=True)

    def fail(self, error: BaseException) -> None:
        """Record why the run ended; its checkpoints stay, so running again resumes."""
        if self.path.exists():
            text = "".join(traceback.format_exception(error))
            write_atomically(
                self.path / "failed.json",
                json.dumps({"error": f"{type(error).__name__}: {error}", "traceback": text}),
            )


def find_runs(root: str | Path) -> Iterator[RunDirectory]:
    """Every run directory at or below ``root``, in the order of their paths."""
    root = Path(root)
    if (root / "recipe.yaml").exists() and (root / "env.json").exists():
        yield RunDirectory(root)
        return
    for file in sorted(root.rglob("env.json")):
        if (file.parent / "recipe.yaml").exists():
            yield RunDirectory(file.parent)
