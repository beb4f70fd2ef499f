"""Figures' arithmetic against its definition: frontier, hypervolume, ink on colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headgate.experiments.report.figures.curves import CROWD, learning_curves
from headgate.experiments.report.figures.pareto import frontier, hypervolume
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.style import house_style, ink_on

from .conftest import recipe, write_run

SIDE = 8
points = st.lists(st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)), min_size=1, max_size=9)


@given(points)
def test_hypervolume_counts_the_dominated_cells(found: list[tuple[int, int]]) -> None:
    x, y = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
    covered = np.zeros_like(x, dtype=bool)
    for a, b in found:
        covered |= (x > a) & (y > b)
    assert hypervolume([(float(a), float(b)) for a, b in found], (SIDE, SIDE)) == covered.sum()


@given(points)
def test_the_frontier_is_what_nothing_beats(found: list[tuple[int, int]]) -> None:
    kept = frontier([(float(a), float(b)) for a, b in found])
    for i, (x, y) in enumerate(found):
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in found)
        assert (i in kept) != beaten


@given(points, st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)))
def test_a_point_more_never_shrinks_the_hypervolume(
    found: list[tuple[int, int]], more: tuple[int, int]
) -> None:
    reference = (float(SIDE), float(SIDE))
    before = [(float(a), float(b)) for a, b in found]
    assert hypervolume([*before, (float(more[0]), float(more[1]))], reference) >= hypervolume(
        before, reference
    )


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_ink_on_any_colour_has_the_contrast_of_wcag_aa(colour: tuple[float, float, float]) -> None:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    light = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    ratio = (light + 0.05) / 0.05 if ink_on(colour) == "black" else 1.05 / (light + 0.05)
    assert ratio >= 4.5


def test_a_crowd_of_settings_has_one_named_curve(tmp_path: Path) -> None:
    """Forty runs of a sweep: grey lines, the best one named, and a legend that leaves room for data."""
    made = recipe(tmp_path, [1]).model_copy(update={"compare": None})
    for index in range(CROWD + 2):
        training = made.training.model_copy(update={"learning_rate": 1e-3 * (index + 1)})
        write_run(made.model_copy(update={"training": training}), 0.05 * index)
    with house_style():
        figure = learning_curves(read_study(tmp_path))
    assert figure is not None
    axes = figure.panels[0].drawing.axes[0]
    assert axes.get_legend_handles_labels()[1] == [f"learning_rate={1e-3 * (CROWD + 2)}"]
    assert len(axes.lines) == CROWD + 2
