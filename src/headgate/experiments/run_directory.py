"""A run directory: what is in it, whether it is complete, partial, failed, or somebody else's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import yaml
from filelock import FileLock, Timeout

from headgate.errors import CheckpointError, ConfigError, DamagedFile, RunBusy
from headgate.experiments.environment import environment
from headgate.experiments.records import Content, Environment, Figures, RunRecord, Verification
from headgate.files import digest, read_json, sync_tree, write_atomically, write_json
from headgate.training.folders import checkpoints

_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
if TYPE_CHECKING:  # reading what runs left behind needs neither a recipe's models nor torch
    from headgate.experiments.recipe import Recipe

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
    def manifest_file(self) -> Path:
        """Digests of the files that a complete run consists of, its result among them."""
        return self.path / "manifest.json"

    @property
    def status(self) -> Status:
        if self.damage() is None:
            return "complete"
        if (self.path / "failed.json").exists():
            return "failed"
        return "partial" if self.recipe_file.exists() else "new"

    def damage(self) -> str | None:
        """Why ``result.json`` cannot be taken for the run's result; None where it can."""
        if not self.result_file.exists():
            return "it has no result.json"
        try:
            read_json(self.result_file)
        except DamagedFile as error:
            return str(error)
        if self.manifest_file.exists():  # runs of earlier versions have none
            try:
                written = read_json(self.manifest_file)["files"]["result.json"]
            except (DamagedFile, KeyError, TypeError):
                return f"{self.manifest_file} is damaged"
            if digest(self.result_file) != written:
                return f"{self.result_file} has changed since it was written"
        return None

    @property
    def resumable(self) -> bool:
        return bool(checkpoints(self.trainer_dir))

    def recipe(self) -> Recipe:
        """The resolved recipe of the run. Raises CheckpointError where there is none, or a torn one."""
        from headgate.experiments.recipe_file import recipe_from

        return recipe_from(self.recipe_content(), str(self.recipe_file))

    def recipe_content(self) -> Content:
        """The recipe as it stands in the file, not validated: of any version, and quick to read."""
        if not self.recipe_file.exists():
            raise CheckpointError(f"{self.path} is no run directory: it has no recipe.yaml")
        try:
            content = yaml.load(self.recipe_file.read_bytes(), Loader=_SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DamagedFile(f"{self.recipe_file} is damaged ({str(error).splitlines()[0]})") from None
        if not isinstance(content, dict):
            raise DamagedFile(f"{self.recipe_file} is damaged: it holds no recipe")
        return content

    def environment(self) -> Environment:
        """Versions, hardware and command of the run."""
        return cast("Environment", read_json(self.path / "env.json"))

    def result(self) -> RunRecord:
        """The final metrics. Raises CheckpointError for a run that has not finished, or whose result was changed."""
        wrong = self.damage()
        if wrong is not None:
            cure = (
                "run its recipe again"
                if not self.result_file.exists()
                else "run its recipe again with --fresh"
            )
            raise CheckpointError(f"{self.path} is {self.status}: {wrong}; {cure}")
        return cast("RunRecord", read_json(self.result_file))

    def verification(self) -> Verification | None:
        """What ``headgate verify`` found last, or else the run itself at its end; None where nobody looked."""
        if self.verification_file.exists():
            return cast("Verification", read_json(self.verification_file))
        return self.result().get("verification")

    @property
    def verified(self) -> bool:
        """Whether what the run saved was loaded again and measured to be what it reports."""
        record = self.verification()
        return record is not None and bool(record["verified"])

    @property
    def verification_file(self) -> Path:
        return self.path / "verification.json"

    def metrics(self) -> list[Figures]:
        """The telemetry rows so far; a line that is torn or still being written is left out."""
        return list(self.iterate_metrics())

    def thinned_metrics(self, most: int) -> list[dict[str, object]]:
        """About ``most`` training rows and as many validations, evenly spaced: enough to draw, quick to read."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().splitlines()
        validations = [i for i, line in enumerate(lines) if b'"eval_' in line]
        trained = [i for i, line in enumerate(lines) if b'"eval_' not in line]
        kept = {
            i for part in (validations, trained) for i in (*part[:: max(1, len(part) // most)], *part[-1:])
        }
        return [row for i in sorted(kept) if (row := _row(lines[i])) is not None]

    def iterate_metrics(self) -> Iterator[dict[str, object]]:
        """As ``metrics``, one row at a time."""
        if not self.metrics_file.exists():
            return
        with self.metrics_file.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (row := _row(line)) is not None:
                    yield row

    def open(self, recipe: Recipe, *, fresh: bool = False) -> None:
        """Create or reopen for this recipe. Raises CheckpointError if the folder holds another recipe's run."""
        from headgate.experiments.inputs import input_digests
        from headgate.experiments.recipe_file import dump_recipe

        try:
            other = self.recipe_file.exists() and not fresh and self.recipe().identity() != recipe.identity()
        except (DamagedFile, ConfigError):
            other = False  # torn: the folder's name says which recipe it is, and it is written again
        if other:
            raise CheckpointError(
                f"{self.path} holds a run of another recipe: choose another output_dir or name, or --fresh to replace it"
            )
        now = input_digests(recipe)
        if not fresh:
            self.require_same_inputs(now)
        if fresh and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.rglob(".*.[0-9]*"):
            leftover.unlink(missing_ok=True)  # what a kill left beside the file that it was to become
        for stale in ("failed.json", "result.json", "verification.json"):
            (self.path / stale).unlink(missing_ok=True)  # a whole result is never opened again
        write_atomically(self.recipe_file, dump_recipe(recipe))
        write_json(self.path / "env.json", environment())
        write_json(self.inputs_file, now)

    @property
    def inputs_file(self) -> Path:
        """Digests of what the run reads."""
        return self.path / "inputs.json"

    def require_same_inputs(self, now: Mapping[str, str]) -> None:
        """Raise CheckpointError where the run was made from other inputs than ``now`` (see ``experiments.inputs``)."""
        if self.inputs_file.exists():  # a run of an earlier version has none
            try:
                before = read_json(self.inputs_file)
            except DamagedFile as error:
                if self.status == "complete" or self.resumable:
                    raise DamagedFile(
                        f"{error}: nobody can tell whether the run's inputs are the same; start over with --fresh"
                    ) from None
                return
            from headgate.experiments.inputs import require_same_inputs

            require_same_inputs(before, now, self.path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out while this one writes. Raises RunBusy where one is writing already."""
        made = [parent for parent in (self.path.parent, *self.path.parent.parents) if not parent.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.with_name(f".{self.path.name}.lock")
        lock = FileLock(file, timeout=0)
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
            if (
                not self.path.exists()
            ):  # the input was refused before anything was written: nothing is left of it
                file.unlink(missing_ok=True)
                for folder in made:
                    with suppress(OSError):
                        folder.rmdir()

    def finish(self, result: RunRecord) -> None:
        """Write the result, last and whole; what was only needed to resume is deleted."""
        sync_tree(self.path)  # before the manifest speaks of them
        text = json.dumps(result, indent=1)
        names = ["recipe.yaml", "inputs.json", "metrics.jsonl"]
        files = {name: digest(self.path / name) for name in names if (self.path / name).exists()}
        for path in sorted(self.predictions.glob("*.jsonl")):
            files[str(path.relative_to(self.path))] = digest(path)
        files["result.json"] = hashlib.sha256(text.encode()).hexdigest()
        write_json(self.manifest_file, {"files": files})
        write_atomically(self.result_file, text)
        shutil.rmtree(self.trainer_dir, ignore_errors=True)

    def fail(self, error: BaseException) -> None:
        """Record why the run ended; its checkpoints stay, so running again resumes."""
        if self.path.exists():
            text = "".join(traceback.format_exception(error))
            with suppress(OSError):  # a full disk is often why: the error itself must come through
                write_json(
                    self.path / "failed.json",
                    {"error": f"{type(error).__name__}: {error}", "traceback": text},
                )


def _row(line: str | bytes) -> dict[str, object] | None:
    """A line of ``metrics.jsonl`` as a row; None for a torn one, or one that is no row."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


MARKS = frozenset({"recipe.yaml", "env.json", "inputs.json", "metrics.jsonl", "result.json"})
"""A folder with two of these is a run, whichever a crash took: a run that has lost a file is listed, not left out."""


def find_runs(root: str | Path) -> Iterator[RunDirectory]:
    """Every run directory at or below ``root``, in the order of their paths. No run lies inside another."""
    for folder, below, files in os.walk(root):
        below.sort()
        if len(MARKS.intersection(files)) >= 2:
            below.clear()
            yield RunDirectory(Path(folder))
