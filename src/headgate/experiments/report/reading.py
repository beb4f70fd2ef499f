"""Folders as studies: a comparison (whole or unfinished), a sweep, one run, or any folder of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from headgate.errors import CheckpointError, DamagedFile
from headgate.experiments.listing import flatten
from headgate.experiments.metric import Metric
from headgate.experiments.records import ComparisonTable, Content, SweepTable
from headgate.experiments.report.study import Arm, Run, Study
from headgate.experiments.report.tabled import TabledRun
from headgate.experiments.run_directory import RunDirectory, find_runs
from headgate.experiments.sweep_table import describe
from headgate.files import read_json

ROWS_IN_ALL = 20_000
"""Telemetry rows of a whole folder of runs: the more runs, the fewer of each."""
NOT_VARIED = ("base", "name", "seed", "output_dir", "report_to", "logging_every", "compare", "sweep")


def read_study(folder: Path) -> Study:
    """Whatever ``folder`` holds. Raises CheckpointError when it is absent or holds no run at all."""
    if folder.is_file():
        return _table_alone(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder: name a comparison, a run directory, or a folder of runs"
        )
    for file in ("comparison.json", "progress.json"):
        if (folder / file).exists():
            return _comparison(folder, read_json(folder / file))
    if (folder / "sweep.json").exists():
        return _sweep(folder, cast("SweepTable", read_json(folder / "sweep.json")))
    if len(cells := _cells(folder)) > 1:
        return _map(folder, cells)
    directories = list(find_runs(folder))
    most = max(20, ROWS_IN_ALL // max(len(directories), 1))
    runs = [Run(directory, most) for directory in directories if _readable(directory)]
    if not runs:
        raise CheckpointError(f"{folder} holds no comparison and no run: there is nothing to report")
    if runs[0].directory.path == folder:
        return _single(folder, runs[0])
    return _many(folder, runs)


def _table_alone(file: Path) -> Study:
    """A ``comparison.json`` that somebody kept or sent. Raises CheckpointError for any other file."""
    with suppress(DamagedFile):
        content = read_json(file)
        if isinstance(content, dict) and "contrasts" in content and "arms" in content:
            return _comparison(file.with_suffix(""), content)
    raise CheckpointError(
        f"{file} is no comparison.json: name that file, a comparison, a run directory, or a folder of runs"
    )


def _cells(folder: Path) -> dict[str, ComparisonTable]:
    """Finished comparisons of one baseline and one kind of figure, two levels down, in order of their names.

    Of one name and metric the last written counts; a comparison that was judged on several has a cell for each.
    """
    files = sorted(folder.glob("*/comparison-*/comparison.json"), key=lambda file: file.stat().st_mtime)
    found = {}
    for file in files:
        with suppress(DamagedFile):  # torn by a crash: comparing again writes it anew
            cell = cast("ComparisonTable", read_json(file))
            found[cell["name"], cell["metric"]] = cell
    if len({(cell["baseline"], metric.rsplit(".", 1)[-1]) for (_, metric), cell in found.items()}) != 1:
        return {}
    names = [name for name, _ in found]
    cells = {
        name if names.count(name) == 1 else f"{name}: {metric.split('.')[-2]}": cell
        for (name, metric), cell in found.items()
    }
    return dict(sorted(cells.items(), key=lambda item: natural(item[0])))


def _map(folder: Path, cells: Mapping[str, ComparisonTable]) -> Study:
    paths = {tuple(cell["metric"].split(".")) for cell in cells.values()}
    return Study(
        kind="map",
        name=folder.name,
        folder=folder,
        metric=Metric(paths.pop() if len(paths) == 1 else (min(paths)[-1],)),
        arms=[],
        seeds=sorted({seed for cell in cells.values() for seed in cell["seeds"]}),
        baseline=next(iter(cells.values()))["baseline"],
        cells=cells,
    )


def natural(name: str) -> list[tuple[int, float, str]]:
    """A sorting key by which ``rows=40`` comes before ``rows=160``."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0.0, part) for part in parts if part]


def _readable(directory: RunDirectory) -> bool:
    """A run whose recipe is torn has no place in a report; ``headgate runs`` lists it as damaged."""
    try:
        directory.recipe_content()
    except CheckpointError:
        return False
    return True


def _comparison(folder: Path, content: Content) -> Study:
    arms, missing = [], []
    for name, arm in content["arms"].items():
        runs: dict[int, Run] = {}
        for place, seed in enumerate(content["seeds"]):
            path = arm["runs"].get(str(seed)) or arm.get("planned", {}).get(str(seed))
            directory = _find(folder, path) if path is not None else None
            if directory is None and "contrasts" in content:
                kept = RunDirectory(Path(path or f"{name}-s{seed}"))
                runs[int(seed)] = TabledRun(
                    kept, arm=arm, place=place, model=content["model"], seed=int(seed)
                )
            elif directory is None:
                gone = str(seed) in arm["runs"]
                missing.append(f"{name}, seed {seed}" + (f" ({path} is gone)" if gone else ""))
            else:
                runs[int(seed)] = Run(directory)
        arms.append(Arm(name, runs))
    return Study(
        kind="comparison",
        name=content["name"],
        folder=folder,
        metric=Metric(tuple(content["metric"].split("."))),
        arms=arms,
        seeds=content["seeds"],
        baseline=content["baseline"],
        summary=cast("ComparisonTable", content) if "contrasts" in content else None,
        missing=missing,
    )


def _find(folder: Path, path: str) -> RunDirectory | None:
    """The run beside the comparison, where a moved or copied folder keeps it, else where it was made."""
    for candidate in (folder.parent / Path(path).name, Path(path)):
        if (candidate / "recipe.yaml").exists():
            return RunDirectory(candidate)
    return None


def _single(folder: Path, run: Run) -> Study:
    if "seed" not in run.recipe:
        raise CheckpointError(f"{folder}/recipe.yaml names no seed: it is not what a run leaves behind")
    arm = Arm("+".join(run.methods) or run.recipe.get("name", folder.name), {run.recipe["seed"]: run})
    return Study(
        kind="run",
        name=run.recipe.get("name", folder.name),
        folder=folder,
        metric=_first_metric([run]),
        arms=[arm],
        seeds=[run.recipe["seed"]],
    )


def _many(folder: Path, runs: Sequence[Run]) -> Study:
    """Runs grouped by what varies between their recipes, seeds apart: a sweep, in whatever way it was made."""
    flat = [_settings(run.recipe) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    varied = [k for k in keys if len({json.dumps(s[k]) for s in flat if k in s}) > 1]
    arms: dict[str, dict[int, Run]] = {}
    for run, settings in zip(runs, flat, strict=True):
        label = ", ".join(f"{k.rsplit('.', 1)[-1]}={settings[k]}" for k in varied if k in settings)
        arms.setdefault(label or run.recipe.get("name", folder.name), {})[run.recipe["seed"]] = run
    return Study(
        kind="runs",
        name=folder.name,
        folder=folder,
        metric=_first_metric(runs),
        arms=[Arm(name, by_seed) for name, by_seed in arms.items()],
        seeds=sorted({run.recipe["seed"] for run in runs}),
        varied=varied,
    )


def _sweep(folder: Path, table: SweepTable) -> Study:
    """The runs of ``sweep.json`` by their overrides, seeds apart; a run that never began is missing."""
    arms: dict[str, dict[int, Run]] = {}
    missing = []
    for row in table["runs"]:
        directory = _find(folder, row["run"])
        if directory is None:
            missing.append(row["label"] + (f" ({row['error']})" if "error" in row else ""))
            continue
        run = Run(directory)
        label = describe({key: value for key, value in row["overrides"].items() if key != "seed"})
        arms.setdefault(label, {})[run.recipe["seed"]] = run
    runs = [run for by_seed in arms.values() for run in by_seed.values()]
    return Study(
        kind="runs",
        name=table["name"],
        folder=folder,
        metric=_first_metric(runs),
        arms=[Arm(name, by_seed) for name, by_seed in arms.items()],
        seeds=sorted({run.recipe["seed"] for run in runs}),
        missing=missing,
        varied=[key for key in table["keys"] if key != "seed"],
    )


def _settings(recipe: Content) -> dict[str, object]:
    """Flat settings; ``methods`` as their names, so that a run without a method differs in one key only."""
    content = {k: v for k, v in recipe.items() if k not in NOT_VARIED}
    methods = content.get("methods") or {}
    return {**dict(flatten(content)), "methods": "+".join(methods) or "none"}


def _first_metric(runs: Sequence[Run]) -> Metric | None:
    """The first evaluation's accuracy or loss, else validation loss; None while no run is complete."""
    for run in runs:
        for task, found in ((run.result or {}).get("evaluation") or {}).items():
            for name in ("accuracy", "loss"):
                if name in found:
                    return Metric(("evaluation", task, name))
        if run.training.get("eval_loss") is not None:
            return Metric(("training", "eval_loss"))
    return None
