"""Quality against compute: the Pareto frontier, dominated points marked, and its hypervolume."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from headgate.experiments.report.content import Figure, Panel
from headgate.experiments.report.figures.curves import CROWD
from headgate.experiments.report.study import Arm, Study
from headgate.experiments.report.style import WIDTH, big, big_axis, colours, markers, new_panel, shared_legend
from headgate.experiments.report.words import metric_axis, metric_name, number, seeds_phrase

Point = tuple[float, float]


def frontier(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other one beats, by falling cost. A point is (cost, loss); both are lowered.

    A point is dominated if another is no worse in both and better in one; equal points stay together.
    """
    kept = [
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
    ]
    return sorted(kept, key=lambda i: (-points[i][0], points[i][1]))


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area between the points and ``reference`` that they dominate, both coordinates lowered.

    A point beyond the reference adds nothing.
    """
    area, ceiling = 0.0, reference[1]
    inside = sorted({p for p in points if p[0] < reference[0] and p[1] < reference[1]})
    for x, y in inside:
        if y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


Cost = Callable[[Arm], list[float]]
TRAINING: Mapping[str, tuple[str, Cost]] = {
    "flops": ("training FLOPs, executed", lambda arm: arm.training("flops")),
    "seconds": ("training seconds", lambda arm: arm.training("seconds")),
}


def pareto(
    study: Study, costs: Mapping[str, tuple[str, Cost]] = TRAINING, title: str = "Quality against compute"
) -> Figure | None:
    """The metric against each cost: one panel each, None where fewer than two arms have both."""
    metric = study.metric
    if metric is None:
        return None
    sign = -1.0 if metric.higher_is_better else 1.0
    names = [arm.name for arm in study.arms]
    colour, shape = colours(names, study.baseline), markers(names)
    panels, volumes = [], []
    for key, (label, cost) in costs.items():
        points = {arm.name: point for arm in study.arms if (point := _point(study, arm, cost)) is not None}
        if len(points) < 2:
            continue
        lowered = [(x, sign * y) for x, y in points.values()]
        best = [list(points)[i] for i in frontier(lowered)]
        worst = (max(x for x, _ in lowered), max(y for _, y in lowered))
        ideal = (min(x for x, _ in lowered), min(y for _, y in lowered))
        area = (worst[0] - ideal[0]) * (worst[1] - ideal[1])
        share = hypervolume(lowered, worst) / area if area else 0.0
        drawing, axes = new_panel((WIDTH, 3.4))
        steps = sorted(points[name] for name in best)
        axes.step(*zip(*steps, strict=True), where="post", color="#8a8a8a", linewidth=1, zorder=1)
        for name, (x, y) in points.items():
            face = colour[name] if name in best else "white"
            axes.plot(
                [x],
                [y],
                shape[name],
                color=colour[name],
                markerfacecolor=face,
                markersize=7,
                label=name if name in best or len(points) <= CROWD else None,
            )
        axes.margins(x=0.08, y=0.12)
        shared_legend(drawing, axes)
        metric_axis(axes.yaxis, metric)
        axes.set_xlabel(label)
        axes.set_ylabel(metric.path[-1])
        axes.set_title(f"Against {label.removesuffix(', executed')}")
        big_axis(axes.xaxis)
        axes.grid()
        axes.set_axisbelow(True)
        corners = [f"{big(x)}, {number(metric, sign * y)}" for x, y in (worst, ideal)]
        volumes.append(f"{share:.3f} against {label} (reference {corners[0]}; ideal {corners[1]})")
        panels.append(
            Panel(
                f"pareto_{key}",
                drawing,
                f"{metric_name(metric)} against {label}. On the frontier: {', '.join(best)}. Dominated: "
                f"{', '.join(name for name in points if name not in best) or 'none'}.",
            )
        )
    if not panels:
        return None
    return Figure(
        title,
        f"Means over seeds of {metric_name(metric)}, medians of cost, {seeds_phrase(study)}. Filled marks lie on the "
        "Pareto frontier, hollow ones are dominated. Hypervolume, as a share of the rectangle from the reference point (worst cost and worst value of "
        f"all arms) to the ideal one (best of both): {'; '.join(volumes)}.",
        panels,
    )


def _point(study: Study, arm: Arm, cost: Cost) -> Point | None:
    assert study.metric is not None
    spent, values = cost(arm), list(arm.values(study.metric).values())
    return (statistics.median(spent), statistics.fmean(values)) if spent and values else None
