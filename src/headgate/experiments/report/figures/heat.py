"""A matrix as a heat map with its values written in where they fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headgate.experiments.report.content import Panel
from headgate.experiments.report.style import HEAT, WIDTH, ink_on, new_panel, short_name

WRITTEN = 10
"""Columns up to which every cell carries its number."""


def heat_panel(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    key: str,
    title: str,
    *,
    label: str,
    across: str,
    form: str = ".2f",
    limits: tuple[float, float] | None = None,
) -> Panel:
    """``matrix`` by row and column name; NaN stays white. ``limits`` fix the colours' range."""
    values = np.array(matrix, dtype=float)
    drawing, axes = new_panel((WIDTH, 1.2 + 0.3 * len(rows)))
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    image = axes.pcolormesh(values, cmap=HEAT, vmin=low, vmax=high, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    if len(columns) <= WRITTEN and len(rows) <= WRITTEN:
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = ink_on(image.to_rgba(value))
                axes.text(
                    j + 0.5, i + 0.5, f"{value:{form}}", ha="center", va="center", color=ink, fontsize=7.5
                )
    every = max(1, len(columns) // WRITTEN)
    axes.set_xticks([i + 0.5 for i in range(0, len(columns), every)], list(columns)[::every])
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [short_name(name) for name in rows])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(across)
    axes.set_title(title)
    bar = drawing.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    told = "; ".join(
        f"{row}: {', '.join('none' if np.isnan(v) else format(v, form) for v in line)}"
        for row, line in zip(rows, values, strict=True)
    )
    return Panel(key, drawing, f"{title}, {label} by {across}. {told}.")
