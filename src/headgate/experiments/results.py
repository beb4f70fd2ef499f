"""Runs and comparisons in Python and in a notebook: figures as pandas frames, plots, verdicts; ``hg.train``, ``hg.compare``.

What is returned is read from the folders that the command line writes and reads: nothing is measured twice, or otherwise.
"""

from __future__ import annotations

import copy
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from headgate.errors import CheckpointError, ConfigError
from headgate.experiments.compare import Comparison
from headgate.experiments.console import Console
from headgate.experiments.draft import draft
from headgate.experiments.listing import run_row
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import load_recipe, recipe_of_content
from headgate.experiments.records import ComparisonTable, RunRecord
from headgate.experiments.report import words, write_report
from headgate.experiments.report.content import Figure
from headgate.experiments.report.figures.curves import learning_curves, training_curves
from headgate.experiments.report.figures.paired import paired
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import house_style
from headgate.experiments.run import run
from headgate.experiments.run_directory import RunDirectory

if TYPE_CHECKING:
    from types import ModuleType

    import pandas
    from matplotlib.figure import Figure as Drawing

AnyRecipe = str | Path | Mapping[str, object] | Recipe


def train(
    recipe: AnyRecipe | None = None,
    *,
    data: str | Path | None = None,
    model: str = "embedded",
    methods: Sequence[str] = (),
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> RunResult:
    """``headgate train``: train and evaluate, or resume, or read what is complete already.

    Args:
        recipe: a file, the name of one of the package's, a mapping, or a Recipe; or instead of it
        data: rows of one's own, from which one is drafted for ``model`` with all ``methods`` in one run.
        overrides: ``"training.max_steps=60"``, as after ``--set``. say: what is told on the way goes here; ``print`` will do.

    Raises ConfigError before any work for a wrong recipe; TrainingError where training fails.
    """
    made = _recipe(recipe, data, model, methods, overrides, compared=False)
    return RunResult(run(made, console=Console(say=say)).path)


def compare(
    recipe: AnyRecipe | None = None,
    *,
    data: str | Path | None = None,
    model: str = "embedded",
    methods: Sequence[str] = (),
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> ComparisonResult:
    """``headgate compare``: every arm at every seed, one run after the other; complete runs are skipped.

    Arguments and errors as of ``train``; a drafted recipe has an arm for each of ``methods`` beside plain LoRA. TrainingError where a
    run is not what it reports.
    """
    comparison = Comparison(
        _recipe(recipe, data, model, methods, overrides, compared=True), say=say, console=Console(say=say)
    )
    comparison.execute()
    return ComparisonResult(comparison.folder)


def open_results(folder: str | Path) -> RunResult | ComparisonResult:
    """What ``folder`` holds: a run directory, or a comparison, complete or not. Raises CheckpointError for anything else."""
    study = read_study(Path(folder))
    if study.kind == "comparison":
        return ComparisonResult(Path(folder))
    if study.kind == "run":
        return RunResult(Path(folder))
    raise CheckpointError(
        f"{folder} holds {len(study.runs)} runs and no comparison: name one run or a comparison-... folder"
    )


@dataclass(frozen=True, repr=False)
class _Folder:
    """A folder of results: read once, when something of it is asked for."""

    folder: Path

    @cached_property
    def study(self) -> Study:
        return read_study(self.folder)

    @property
    def verdict(self) -> str:
        """One sentence for the whole of it."""
        return words.headline(self.study)

    def page(self) -> Path:
        """Writes the report; where it lies."""
        return write_report(self.folder).page

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}): {self.verdict}"


class RunResult(_Folder):
    """One run directory."""

    @property
    def result(self) -> RunRecord:
        """``result.json``: training, evaluation, verification. Raises CheckpointError where the run is not complete."""
        return RunDirectory(self.folder).result()

    @property
    def checkpoint(self) -> Path:
        """What ``hg.load`` loads."""
        return RunDirectory(self.folder).checkpoint

    def frame(self) -> pandas.DataFrame:
        """The log, one row a log or validation, ``step`` as the index; numbers only."""
        pandas = _pandas()
        rows = [
            {k: v for k, v in row.items() if isinstance(v, (int, float, str))}
            for row in RunDirectory(self.folder).metrics()
        ]
        return pandas.DataFrame(
            rows, columns=list(dict.fromkeys(["step", *(k for r in rows for k in r)]))
        ).set_index("step")

    def plot(self) -> Drawing:
        """The learning curves, or those of training where nothing was validated. Raises ConfigError before the first log."""
        with house_style():
            return _first([learning_curves(self.study), training_curves(self.study)], self.folder)


class ComparisonResult(_Folder):
    """One comparison: its arms, differences and verdicts."""

    def frame(self) -> pandas.DataFrame:
        """One row an arm: mean and SD of the metric, the difference from the baseline with its 95% interval, verdict, cost."""
        summary = self._summary()
        rows = []
        for name, arm in summary["arms"].items():
            contrast = summary["contrasts"].get(name)
            t: Mapping[str, float] = (contrast["t"] if contrast else None) or {}
            rows.append(
                {
                    "arm": name,
                    "mean": arm["mean"],
                    "sd": arm["sd"],
                    "difference": t.get("mean"),
                    "low": t.get("low"),
                    "high": t.get("high"),
                    "holm_p": contrast["holm_p"] if contrast else None,
                    "verdict": contrast["verdict"] if contrast else "baseline",
                    "seconds": arm["cost"]["seconds"],
                    "verified": arm["verified"],
                }
            )
        return _pandas().DataFrame(rows).set_index("arm")

    def runs(self) -> pandas.DataFrame:
        """One row a run: arm, seed, status, and every number of its result, under its dotted name."""
        rows = [
            {
                "arm": arm.name,
                "seed": seed,
                "metric": arm.values(self.study.metric).get(seed) if self.study.metric else None,
            }
            | {k: v for k, v in run_row(each.directory).items() if k != "seed"}
            for arm in self.study.arms
            for seed, each in arm.runs.items()
        ]
        return _pandas().DataFrame(rows).set_index(["arm", "seed"])

    def plot(self) -> Drawing:
        """Every seed's difference from the baseline with the paired 95% interval. Raises ConfigError where there is none yet."""
        with house_style():
            figure = paired(self.study)
            if figure is None:
                raise ConfigError(
                    f"{self.folder}: no arm has a value beside the baseline's yet: nothing to draw"
                )
            return figure.panels[-1].drawing

    def _summary(self) -> ComparisonTable:
        if self.study.summary is None:
            raise CheckpointError(f"{self.folder} is not finished: run the comparison again to complete it")
        return self.study.summary

    def _repr_html_(self) -> str:
        """In a notebook: the verdict, and the table of arms once it stands."""
        table = "" if self.study.summary is None else str(self.frame().to_html(float_format="{:.4f}".format))
        return f"<p><strong>{html.escape(self.verdict)}.</strong></p>{table}"


def _recipe(
    recipe: AnyRecipe | None,
    data: str | Path | None,
    model: str,
    methods: Sequence[str],
    overrides: Sequence[str],
    *,
    compared: bool,
) -> Recipe:
    if (recipe is None) == (data is None):
        raise ConfigError("give a recipe, or data=FILE to have one drafted: one of them")
    if data is not None:
        drafted = draft(str(data), model, methods)
        content = (drafted if compared else drafted.as_one_run(methods)).content
        return recipe_of_content(content, overrides, f"drafted from {data}")
    if methods or model != "embedded":
        raise ConfigError("model= and methods= go with data=; over a recipe write overrides=['methods=...']")
    if isinstance(recipe, (str, Path)):
        return load_recipe(recipe, overrides)
    if isinstance(recipe, Recipe):
        return recipe_of_content(recipe.model_dump(mode="json"), overrides, "recipe") if overrides else recipe
    return recipe_of_content(copy.deepcopy(dict(recipe or {})), overrides, "recipe")


def _first(figures: Sequence[Figure | None], folder: Path) -> Drawing:
    for figure in figures:
        if figure is not None and figure.panels:
            return figure.panels[0].drawing
    raise ConfigError(f"{folder}: nothing has been logged yet: nothing to draw")


def _pandas() -> ModuleType:
    """pandas comes with ``datasets``; imported here, so that a plot or a verdict does not wait for it."""
    import pandas

    return pandas
