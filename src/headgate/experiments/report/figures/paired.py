"""Every seed, paired: the values themselves, and the differences from the baseline with the primary interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes

from headgate.experiments.report.content import Figure, Panel
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import INK, MUTED, WIDTH, colours, markers, new_panel, short_name
from headgate.experiments.report.words import metric_axis, metric_name, number, seeds_phrase


def paired(study: Study) -> Figure | None:
    """Left: values by arm, a line a seed. Right: differences a seed, their mean, the 95% t interval."""
    metric = study.metric
    values = {arm.name: arm.values(metric) for arm in study.arms} if metric is not None else {}
    names = [name for name, found in values.items() if found]
    if metric is None or study.baseline not in names or len(names) < 2:
        return None
    assert study.baseline is not None
    colour, shape = (
        colours([a.name for a in study.arms], study.baseline),
        markers([a.name for a in study.arms]),
    )
    size = (WIDTH, 1.1 + 0.36 * len(names))
    trained = {name for name in names if study.arm(name).trained}
    places = {name: -row for row, name in enumerate(names)}

    left, axes = new_panel(size)
    for seed in study.seeds:
        line = [(values[n][seed], places[n]) for n in names if seed in values[n]]
        axes.plot([x for x, _ in line], [y for _, y in line], color="#bdbdbd", linewidth=0.8, zorder=1)
    for name in names:
        xs = list(values[name].values())
        axes.plot(xs, [places[name]] * len(xs), shape[name], color=colour[name], alpha=0.9)
    axes.set_yticks(list(places.values()), [short_name(name) for name in names], color=INK)
    axes.set_xlabel(metric.path[-1])
    axes.set_title("Value of every seed")
    _rows(axes, names)
    _scale(axes, {n: list(values[n].values()) for n in names}, trained, places, lambda x: number(metric, x))
    metric_axis(axes.xaxis, metric)

    right, axes = new_panel(size)
    draw_differences(axes, study, names)
    others = [name for name in names if name != study.baseline]

    told = "; ".join(
        f"{name}: {', '.join(number(metric, v) for v in values[name].values())}" for name in names
    )
    bars = (
        "the bar is the paired 95% t interval over seeds, its tick the mean"
        if any(c["t"] for c in study.contrasts.values())
        else "no interval is drawn"
    )
    return Figure(
        "Paired by seed",
        f"{metric_name(metric).capitalize()}, {seeds_phrase(study)}. Above or left: values, grey lines joining the same seed. "
        f"Below or right: each mark is one seed's difference; {bars}.",
        [
            Panel("paired_values", left, f"{metric_name(metric)} by seed. {told}."),
            Panel(
                "paired_differences",
                right,
                f"Differences from {study.baseline} by seed: "
                + "; ".join(f"{n}: {study.contrasts[n]['verdict']}" for n in others if n in study.contrasts)
                + ".",
            ),
        ],
    )


def draw_differences(axes: Axes, study: Study, names: Sequence[str]) -> None:
    """Each seed's difference from the baseline on ``axes``, a row an arm of ``names``, with the 95% t interval below it.

    ``names`` are the arms that have values, the baseline among them, whose row stays empty.
    """
    metric = study.metric
    assert metric is not None and study.baseline is not None
    values = {name: study.arm(name).values(metric) for name in names}
    arms = [arm.name for arm in study.arms]
    colour, shape = colours(arms, study.baseline), markers(arms)
    places = {name: -row for row, name in enumerate(names)}
    trained = {name for name in names if study.arm(name).trained}
    drawn: dict[str, list[float]] = {}
    others = [name for name in names if name != study.baseline]
    axes.axvline(0, color=INK, linewidth=0.8)
    for name in others:
        y, found = places[name], study.contrasts.get(name)
        base = values[study.baseline]
        deltas = [value - base[seed] for seed, value in values[name].items() if seed in base]
        axes.plot(
            deltas, [y] * len(deltas), shape[name], color=colour[name], markerfacecolor="white", alpha=0.9
        )
        drawn[name] = [*deltas, 0.0]  # no difference is always in sight
        if found is not None and found["t"] is not None:
            t = found["t"]
            drawn[name] = [*deltas, t["low"], t["high"], 0.0]
            axes.plot([t["low"], t["high"]], [y - 0.22] * 2, color=colour[name], linewidth=2.2)
            axes.plot([t["mean"]], [y - 0.22], "|", color=colour[name], markersize=9, markeredgewidth=2)
    axes.set_yticks([places[n] for n in others], [short_name(n) for n in others], color=INK)
    axes.set_xlabel(f"difference from {study.baseline} ({_directions(metric.higher_is_better)})")
    axes.set_title(f"Difference from {study.baseline}, seed by seed")
    _rows(axes, names)
    _scale(axes, drawn, trained, places, lambda x: number(metric, x, signed=True))
    metric_axis(axes.xaxis, metric, signed=True)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_ylim(0.4 - len(names), 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _scale(
    axes: Axes,
    drawn: Mapping[str, Sequence[float]],
    trained: set[str],
    places: Mapping[str, int],
    write: Callable[[float], str],
) -> None:
    """Limits from the trained arms; what an untrained one has beyond them is written at the edge, in numbers."""
    inside = [x for name, xs in drawn.items() if name in trained for x in xs] or [
        x for xs in drawn.values() for x in xs
    ]
    low, high = min(inside), max(inside)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_xlim(low - room, high + room)
    for name, xs in drawn.items():
        beyond = [x for x in xs if not low - room <= x <= high + room]
        if beyond:
            right = beyond[0] > high
            axes.annotate(
                f"{write(fmean(beyond))} →" if right else f"← {write(fmean(beyond))}",
                (1.0 if right else 0.0, places[name]),
                xycoords=axes.get_yaxis_transform(),
                ha="right" if right else "left",
                va="center",
                color=MUTED,
            )


def _directions(higher: bool) -> str:
    return "← worse · better →" if higher else "← better · worse →"
