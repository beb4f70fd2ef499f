"""Curves over seeds: any telemetry name against steps, trained tokens, training seconds, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from headgate.experiments.report.content import Figure, Panel
from headgate.experiments.report.study import Arm, Study, Unit
from headgate.experiments.report.style import RULE, big_axis, colours, markers, new_panel, shared_legend
from headgate.experiments.report.words import seeds_phrase
from headgate.experiments.statistics import MINIMUM_SEEDS

AXES: dict[Unit, str] = {
    "steps": "optimizer steps",
    "tokens": "trained tokens",
    "seconds": "training seconds",
    "flops": "training FLOPs, executed",
    "accepted": "accepted micro-batches",
}
CROWD = 10
"""Arms up to which each has a colour and a name."""
MARKED = 12
"""Points of a curve up to which each is marked."""


def learning_curves(study: Study) -> Figure | None:
    """Validation loss on four clocks; training loss where nothing was validated; None where nothing was logged."""
    logged = {name for run in study.runs for row in run.rows for name in row}
    name, label = ("eval_loss", "validation loss") if "eval_loss" in logged else ("loss", "training loss")
    units: list[Unit] = ["steps", "tokens", "seconds", "flops"]
    panels = [
        curve_panel(study, study.arms, name, label, f"learning_curve_{unit}", unit=unit) for unit in units
    ]
    drawn = [panel for panel in panels if panel is not None]
    if not drawn:
        return None
    return Figure(
        "Learning curves",
        f"{label.capitalize()}, {band_phrase(study)} Tokens, seconds and FLOPs are those spent on training, "
        "evaluation left out.",
        drawn,
    )


TRAINING = (("loss", "training loss"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm"))


def training_curves(study: Study) -> Figure | None:
    """Training loss, learning rate and gradient norm against steps; None where nothing was logged.

    The training loss is left out where it stands among the learning curves already, for want of a validation.
    """
    validated = any("eval_loss" in row for run in study.runs for row in run.rows)
    panels = [
        curve_panel(study, study.arms, name, label, f"training_{name}", title=label.capitalize())
        for name, label in TRAINING
        if validated or name != "loss"
    ]
    drawn = [panel for panel in panels if panel is not None]
    if not drawn:
        return None
    return Figure(
        "How training went",
        f"As logged while it ran, {band_phrase(study)} The gradient norm is taken before clipping.",
        drawn,
    )


def band_phrase(study: Study) -> str:
    """n, the seeds, and what lines and bands are."""
    if len(study.seeds) < MINIMUM_SEEDS:
        return f"{seeds_phrase(study)}; one line a seed: too few seeds for an interval."
    return f"{seeds_phrase(study)}; lines are means over seeds, bands pointwise 95% t intervals."


def curve_panel(
    study: Study,
    arms: Sequence[Arm],
    name: str,
    label: str,
    key: str,
    *,
    title: str | None = None,
    unit: Unit = "steps",
) -> Panel | None:
    """One telemetry name of the arms that logged it; None where none did."""
    shown = [arm for arm in arms if any(run.series(name)[0] for run in arm.distinct)]
    if not shown:
        return None
    drawing, axes = new_panel()
    told = _told(study, shown, name)
    for arm in shown:
        draw_arm(axes, study, arm, name, unit, named=arm in told)
    axes.set_xlabel(AXES[unit])
    axes.set_ylabel(label)
    axes.set_title(title or f"Against {AXES[unit].removesuffix(', executed')}")
    big_axis(axes.xaxis)
    axes.grid(axis="y")
    shared_legend(drawing, axes)
    ends = "; ".join(f"{arm.name} ends at {_end(arm, name):.4g}" for arm in shown)
    return Panel(key, drawing, f"{title or label} against {AXES[unit]}: {ends}.")


def _told(study: Study, shown: Sequence[Arm], name: str) -> list[Arm]:
    """The arms with a colour and a name of their own: all, or in a crowd the baseline and the lowest end."""
    if len(shown) <= CROWD:
        return list(shown)
    return [
        arm for arm in shown if arm.name == study.baseline or arm is min(shown, key=lambda a: _end(a, name))
    ]


def draw_arm(axes: Axes, study: Study, arm: Arm, name: str, unit: Unit, *, named: bool = True) -> None:
    """Mean and interval over seeds where there are three and they were logged at the same steps, else lines.

    An arm that is not ``named`` is a grey line, one of the crowd.
    """
    names = [a.name for a in study.arms]
    colour, marker = colours(names, study.baseline)[arm.name], markers(names)[arm.name]
    if not named:
        for run in arm.distinct:
            steps, values = run.series(name)
            axes.plot(run.clock(steps, unit), values, color=RULE, linewidth=0.8, zorder=1)
        return
    curves = [(run, *run.series(name)) for run in arm.distinct]
    curves = [(run, steps, values) for run, steps, values in curves if steps]
    alike = all(steps == curves[0][1] for _, steps, _ in curves)
    if len(curves) < MINIMUM_SEEDS or not alike:
        for index, (run, steps, values) in enumerate(curves):
            mark = marker if len(steps) <= MARKED else None
            told = arm.name if index == 0 else None
            axes.plot(run.clock(steps, unit), values, color=colour, linewidth=1, label=told, marker=mark)
        return
    x = np.mean([run.clock(steps, unit) for run, steps, _ in curves], axis=0)
    y = np.array([values for _, _, values in curves])
    error = stats.t.ppf(0.975, len(y) - 1) * y.std(0, ddof=1) / np.sqrt(len(y))
    axes.fill_between(x, y.mean(0) - error, y.mean(0) + error, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, y.mean(0), color=colour, label=arm.name, marker=marker if len(x) <= MARKED else None)


def _end(arm: Arm, name: str) -> float:
    return float(np.mean([values[-1] for _, values in (run.series(name) for run in arm.distinct) if values]))
