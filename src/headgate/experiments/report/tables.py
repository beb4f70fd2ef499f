"""The table of arms on the page, and every logged number as CSV."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from headgate.experiments.report.content import Table
from headgate.experiments.report.study import Arm, Study
from headgate.experiments.report.style import big
from headgate.experiments.report.words import interval, metric_name, number, seeds_phrase, verdicts
from headgate.experiments.statistics import coefficient_of_variation

KINDS = {"helps": "helps", "hurts": "hurts", "none": "not detectable", "open": "no interval"}


def arms_table(study: Study) -> Table:
    """One row an arm: the metric over seeds, the difference with its interval, the verdict, what it took."""
    against = study.baseline is not None
    columns = ["arm", "mean", "SD"]
    columns += ["CV"] if study.kind == "runs" else []
    columns += [f"difference from {study.baseline} [95%]", "verdict"] if against else []
    columns += ["validation loss", "steps", "tokens", "seconds"]
    said = {found.arm: KINDS[found.kind] for found in verdicts(study)}
    rows = []
    for arm in study.arms:
        values = list(arm.values(study.metric).values()) if study.metric else []
        cells = [arm.name, number(study.metric, statistics.fmean(values)) if values else "not measured"]
        cells.append(_spread(study, values))
        if study.kind == "runs":
            cv = coefficient_of_variation(values)
            cells.append("–" if cv is None else f"{cv:.3g}")
        if against:
            contrast = study.contrasts.get(arm.name)
            cells.append("–" if contrast is None else interval(study.metric, contrast["t"]))
            cells.append("baseline" if arm.name == study.baseline else said.get(arm.name, "not yet"))
        cells += [_median(arm, "eval_loss", ".4f"), _median(arm, "steps", ",.0f")]
        cells += [_engineered(arm, "trained_tokens"), _median(arm, "seconds", ",.1f")]
        rows.append(cells)
    metric = study.metric
    better = "" if metric is None else f", {'higher' if metric.higher_is_better else 'lower'} is better"
    numeric = [i for i, name in enumerate(columns) if name not in ("arm", "verdict")]
    return Table(f"{metric_name(metric).capitalize()}{better}; {seeds_phrase(study)}", columns, rows, numeric)


def write_csv(study: Study, folder: Path) -> list[Path]:
    """``arms.csv`` (one line a run) and ``metrics.csv`` (one line a log), plain numbers."""
    if study.cells:
        return [_write(folder / "map.csv", [*_map_rows(study)])]
    runs, logs = [], []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            who = {"arm": arm.name, "seed": seed, "run": run.directory.path.name}
            value = arm.values(study.metric).get(seed) if study.metric else None
            figures = {k: v for k, v in run.training.items() if isinstance(v, (int, float))}
            runs.append({**who, "status": run.status, "metric": value, **figures})
            logs += [
                {**who, **{k: v for k, v in row.items() if isinstance(v, (int, float, str))}}
                for row in run.rows
            ]
    return [_write(folder / "arms.csv", runs), _write(folder / "metrics.csv", logs)]


def _map_rows(study: Study) -> Iterator[dict[str, object]]:
    """One line a cell and arm: its mean, its difference from the baseline, the interval, Holm's p."""
    for name, cell in study.cells.items():
        for arm, found in cell["arms"].items():
            contrast = cell["contrasts"].get(arm)
            t: Mapping[str, float] = (contrast["t"] if contrast else None) or {}
            yield {
                "cell": name,
                "arm": arm,
                "mean": found["mean"],
                "difference": t.get("mean"),
                "low": t.get("low"),
                "high": t.get("high"),
                "holm_p": contrast.get("holm_p") if contrast else None,
                "verdict": contrast["verdict"] if contrast else "baseline",
            }


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _spread(study: Study, values: list[float]) -> str:
    if len(values) < 2:
        return "–"
    return number(study.metric, statistics.stdev(values)).removesuffix("%")


def _median(arm: Arm, name: str, form: str) -> str:
    values = arm.training(name)
    return f"{statistics.median(values):{form}}" if values else "–"


def _engineered(arm: Arm, name: str) -> str:
    values = arm.training(name)
    return big(statistics.median(values)) if values else "–"
