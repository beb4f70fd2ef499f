"""A map of comparisons: every arm's difference from the baseline, cell by cell."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from headgate.experiments.records import Contrast
from headgate.experiments.report.content import Block, Figure, Panel, Table
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import INK, new_panel, short_name
from headgate.experiments.report.words import interval, is_share, metric_name, number

DIVERGING = {False: "RdBu_r", True: "RdBu"}
"""Blue is better, by whether higher is; red and blue are told apart by colour-blind readers."""


def comparison_map(study: Study) -> Iterator[Block]:
    """The map as one figure, and as a table with intervals. Nothing for anything but a map."""
    if not study.cells:
        return
    short = _without_common(list(study.cells))
    arms = list(dict.fromkeys(arm for cell in study.cells.values() for arm in cell["contrasts"]))
    counts = sorted({len(cell["seeds"]) for cell in study.cells.values()})
    yield Figure(
        "The map",
        f"Difference in {metric_name(study.metric)} from {study.baseline}, a row a comparison of "
        f"{' or '.join(map(str, counts))} seeds: blue is better than the baseline, red worse. A star: told from it after Holm's "
        "correction over the row's arms.",
        [_panel(study, short, arms)],
    )
    rows = []
    for name, cell in study.cells.items():
        for arm in arms:
            contrast = cell["contrasts"].get(arm)
            if contrast is not None:
                mean = number(study.metric, cell["arms"][arm]["mean"])
                rows.append([short[name], arm, mean, interval(study.metric, contrast["t"]), contrast["verdict"]])  # fmt: skip
    yield Table(
        f"Every cell against {study.baseline}",
        ["cell", "arm", "mean", "difference [95%]", "verdict"],
        rows,
        numeric=(2, 3),
    )


def _panel(study: Study, short: Mapping[str, str], arms: Sequence[str]) -> Panel:
    found = {
        (row, column): (difference, starred)
        for row, cell in enumerate(study.cells.values())
        for column, arm in enumerate(arms)
        if (contrast := cell["contrasts"].get(arm)) is not None
        for difference, starred in [_difference(contrast)]
    }
    higher = study.metric is not None and study.metric.higher_is_better
    # an arm far off in one cell (an untouched base) would leave every other cell white
    sizes = sorted(abs(difference) for difference, _ in found.values())
    reach = sizes[int(0.9 * (len(sizes) - 1))] or max(sizes) or 1.0
    drawing, axes = new_panel((max(4.4, 1.6 + 0.72 * len(arms)), 1.5 + 0.3 * len(study.cells)))
    values = [
        [found.get((row, column), (float("nan"), False))[0] for column in range(len(arms))]
        for row in range(len(study.cells))
    ]
    image = axes.pcolormesh(
        values, cmap=DIVERGING[higher], vmin=-reach, vmax=reach, edgecolors="white", linewidth=0.8
    )
    axes.invert_yaxis()
    for (row, column), (difference, starred) in found.items():
        ink = "white" if abs(difference) > 0.7 * reach else INK
        text = f"{100 * difference:+.1f}" if is_share(study.metric) else f"{difference:+.3f}"
        axes.text(column + 0.5, row + 0.5, text.replace("-", "−") + "*" * starred, ha="center", va="center", color=ink, fontsize=7)  # fmt: skip
    axes.set_xticks(
        [i + 0.5 for i in range(len(arms))],
        [short_name(arm) for arm in arms],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks([i + 0.5 for i in range(len(study.cells))], [short_name(short[n]) for n in study.cells])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"Difference from {study.baseline}")
    bar = drawing.colorbar(image, ax=axes, label="better in blue", fraction=0.05, pad=0.03, extend="both")
    bar.outline.set_visible(False)
    told = "; ".join(
        f"{short[name]}: " + ", ".join(
            f"{arm} {_difference(cell['contrasts'][arm])[0]:+.3f}" for arm in arms if arm in cell["contrasts"]
        )
        for name, cell in study.cells.items()
    )  # fmt: skip
    return Panel("map", drawing, f"{metric_name(study.metric)}, difference from {study.baseline}. {told}.")


def _difference(contrast: Contrast) -> tuple[float, bool]:
    """The mean over seeds, and whether it is told from nothing."""
    return fmean(contrast["differences"]), contrast["verdict"].startswith(("helps", "hurts"))


def _without_common(names: Sequence[str]) -> dict[str, str]:
    """Names without what all of them begin with, up to a word's end."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
    common = "".join(letters[0] for letters in alike)
    cut = max(common.rfind(sign) for sign in " -") + 1
    return {name: name[cut:] for name in names}
