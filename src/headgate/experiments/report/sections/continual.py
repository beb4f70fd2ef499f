"""A continual stream, for any arm that trained on one: the task x time matrix and what is read from it."""

from __future__ import annotations

import statistics

import numpy as np

from headgate.experiments.records import Figures
from headgate.experiments.report.content import Block, Figure, Table
from headgate.experiments.report.figures.heat import heat_panel
from headgate.experiments.report.study import Arm, Study
from headgate.experiments.report.words import seeds_phrase

FIGURES = {
    "average": "average",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer",
    "trace_backward_transfer": "TRACE's backward transfer",
    "general_change": "general change",
}


def continual(study: Study) -> list[Block]:
    """Empty where no complete run has a ``continual`` entry in its result."""
    found = {arm.name: results for arm in study.arms if (results := _results(arm))}
    if not found:
        return []
    rows = []
    for name, results in found.items():
        told = []
        for key in FIGURES:
            values = [r[key] for r in results if isinstance(r.get(key), (int, float))]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            told.append(f"{statistics.fmean(values):.4f}{spread}".replace("-", "−") if values else "–")
        rows.append([name, *told])
    panels = [
        heat_panel(
            np.mean([np.array(r["matrix"], dtype=float) for r in results], axis=0).tolist(),
            [f"after {name}" for name in results[0]["segments"]],
            list(results[0]["skills"]),
            f"continual_{index}",
            arm,
            label="loss",
            across="skill",
        )
        for index, (arm, results) in enumerate(found.items())
    ]
    better = next(iter(found.values()))[0]["better"]
    columns = [f"{title} ({better.get(key, 'higher')} is better)" for key, title in FIGURES.items()]
    caption = f"Loss of every skill after every segment, means over seeds, {seeds_phrase(study)}."
    table = Table(
        f"Of the loss matrix, mean ± SD over seeds; {seeds_phrase(study)}",
        ["arm", *columns],
        rows,
        tuple(range(1, 1 + len(columns))),
    )
    return [table, Figure("Skills over the stream", caption, panels)]


def _results(arm: Arm) -> list[Figures]:
    return [run.result["continual"] for run in arm.distinct if run.result and run.result.get("continual")]
