"""A sweep: the metric against every number that was varied, one mark a run."""

from __future__ import annotations

from matplotlib.ticker import NullFormatter

from headgate.experiments.listing import flatten
from headgate.experiments.report.content import Block, Figure, Panel
from headgate.experiments.report.study import Run, Study
from headgate.experiments.report.style import ACCENT, big_axis, new_panel
from headgate.experiments.report.words import metric_axis, metric_name, number, seeds_phrase

TICKED = 6
"""Values up to which each is a tick."""


def varied(study: Study) -> list[Block]:
    """One panel a varied numeric setting. Empty for anything but a folder of runs that differ."""
    metric = study.metric
    if metric is None or not study.varied:
        return []
    panels = []
    for key in study.varied:
        points = []
        for arm in study.arms:
            values = arm.values(metric)
            settings = {seed: _setting(run, key) for seed, run in arm.runs.items()}
            points += [(x, values[seed]) for seed, x in settings.items() if x is not None and seed in values]
        if len({x for x, _ in points}) < 2:
            continue
        drawing, axes = new_panel()
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=ACCENT, alpha=0.75)
        places = sorted({x for x, _ in points})
        means = [sum(y for x, y in points if x == p) / sum(x == p for x, _ in points) for p in places]
        axes.plot(places, means, color=ACCENT, linewidth=1)
        if min(places) > 0 and max(places) / min(places) >= 20:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len(places) <= TICKED:
            axes.set_xticks(places)
        big_axis(axes.xaxis)
        axes.set_xlabel(key)
        axes.set_ylabel(metric.path[-1])
        axes.set_title(key.rsplit(".", 1)[-1])
        axes.grid(axis="y")
        metric_axis(axes.yaxis, metric)
        told = "; ".join(f"{p:g}: {number(metric, m)}" for p, m in zip(places, means, strict=True))
        panels.append(
            Panel(f"varied_{key.replace('.', '_')}", drawing, f"{metric_name(metric)} by {key}. {told}.")
        )
    if not panels:
        return []
    caption = f"{metric_name(metric).capitalize()} of every complete run, {seeds_phrase(study)}; lines join the means."
    return [Figure("What was varied", caption, panels)]


def _setting(run: Run, key: str) -> float | None:
    value = dict(flatten(run.recipe)).get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
