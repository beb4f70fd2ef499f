"""Several comparisons in one picture: each in its own axes and units, every arm against that comparison's baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headgate.experiments.report.content import Panel
from headgate.experiments.report.figures.paired import draw_differences
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import WIDTH, new_grid
from headgate.experiments.report.words import headline, metric_name

COLUMNS = 2


def overview(studies: Sequence[Study]) -> Panel | None:
    """Two comparisons a row; one that has nothing to compare yet is left out. None where none has."""
    drawable = [(study, names) for study in studies if len(names := _arms(study)) > 1]
    if not drawable:
        return None
    columns = min(COLUMNS, len(drawable))
    rows = math.ceil(len(drawable) / columns)
    height = 1.15 + 0.36 * max(len(names) for _, names in drawable)
    drawing, grid = new_grid(rows, columns, (WIDTH * columns, height * rows))
    for axes, (study, names) in zip(grid, drawable):
        draw_differences(axes, study, names)
        axes.set_title(f"{study.name}: {metric_name(study.metric)}")
    for axes in grid[len(drawable) :]:
        axes.set_axis_off()
    told = "; ".join(f"{study.name}: {headline(study)}" for study, _ in drawable)
    return Panel("overview", drawing, f"Differences from the baseline of each comparison. {told}.")


def _arms(study: Study) -> list[str]:
    """The arms with a value, where the baseline is among them."""
    if study.metric is None or study.baseline is None:
        return []
    names = [arm.name for arm in study.arms if arm.values(study.metric)]
    return names if study.baseline in names else []
