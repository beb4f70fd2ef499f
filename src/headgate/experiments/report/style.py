"""How drawings look: the Okabe-Ito palette, thin frames, text as text; and their files and inline SVG."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

INK, MUTED, RULE = "#1a1a1a", "#595959", "#d4d4d4"
ACCENT = "#0072B2"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00")
"""Colour-blind-safe (Okabe and Ito 2008); its yellow is too faint on white and darkened here."""
MARKERS = "osD^vPX"
HEAT = "cividis"

RC: dict[Any, object] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#8a8a8a",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 5),
    "text.parse_math": False,  # a dollar in an arm's name is a dollar
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "grid.color": "#ececec",
    "grid.linewidth": 0.7,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "savefig.facecolor": "white",
}
WIDTH = 4.4
PNG_DPI = 160
PANEL = (WIDTH, 3.1)
"""Inches. Two panels share a row of the page, so that text has one size throughout."""


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's settings while a report is drawn; restored afterwards."""
    with rc_context(RC):
        yield


def colours(names: Sequence[str], baseline: str | None) -> dict[str, str]:
    """One colour an arm: the baseline is ink, an arm called ``base`` grey, the others the palette in order."""
    chosen, used = {}, 0
    for name in names:
        if name == baseline:
            chosen[name] = INK
        elif name == "base":
            chosen[name] = "#8a8a8a"
        else:
            chosen[name] = OKABE_ITO[used % len(OKABE_ITO)]
            used += 1
    return chosen


def markers(names: Sequence[str]) -> dict[str, str]:
    """A shape an arm, so that colour is never the only difference."""
    return {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(names)}


def new_panel(size: tuple[float, float] = PANEL) -> tuple[Figure, Axes]:
    """A drawing with one axes."""
    drawing = Figure(figsize=size)
    return drawing, drawing.subplots()


def new_grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A drawing with ``rows x columns`` axes, in reading order."""
    drawing = Figure(figsize=size)
    return drawing, list(drawing.subplots(rows, columns, squeeze=False).flat)


def short_name(name: str) -> str:
    """An arm's name where it is drawn: on two lines at most, so that a sweep's long names leave room for data."""
    return "\n".join(textwrap.wrap(name, 26, max_lines=2, placeholder="…"))


def ink_on(rgba: Sequence[float] | np.ndarray[Any, Any]) -> str:
    """Black or white, whichever stands out more from a colour: at least 4.5:1 (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "white"


def shade(share: float) -> str:
    """From white to a mid blue on which ink still reads (AA): the ground of a token in a text."""
    return "#" + "".join(f"{round(255 + 0.6 * share * (channel - 255)):02x}" for channel in (0, 114, 178))


def big(value: float, unit: str = "") -> str:
    """``45.5k``, ``540.3 GB``: an SI prefix from a thousand on."""
    if abs(value) < 1000:
        return f"{value:.4g}{f' {unit}' if unit else ''}"
    return EngFormatter(unit=unit, places=1, sep=" " if unit else "").format_data(value)


def big_axis(axis: Axis) -> None:
    """Ticks with SI prefixes where they are large."""
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:g}" if abs(x) < 1000 else EngFormatter(sep="")(x))
    )


def shared_legend(drawing: Figure, axes: Axes) -> None:
    """Names below the axes, never over the data; as many in a row as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        labels = [short_name(name) for name in labels]
        columns = max(
            1, int(drawing.get_figwidth() * 11 / (max(len(name.split("\n")[0]) for name in labels) + 5))
        )
        drawing.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def bars(
    axes: Axes, found: Mapping[str, float | None], colour: Mapping[str, str], texts: Mapping[str, str]
) -> None:
    """Horizontal bars with their value in words at the end; a missing value is said, never drawn as zero."""
    for row, (name, value) in enumerate(found.items()):
        axes.barh(row, value or 0.0, color=colour[name], height=0.62)
        axes.annotate(
            texts[name],
            (value or 0.0, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
        )
    axes.set_yticks(range(len(found)), [short_name(name) for name in found], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * (max((value or 0.0 for value in found.values()), default=0.0) or 1.0))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def save(drawing: Figure, folder: Path, key: str) -> list[Path]:
    """``key.svg`` and ``key.png``. The PNG is printed directly: ``savefig`` would lay the drawing out once more."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{key}.svg", folder / f"{key}.png"]
    files[0].write_text(svg_of(drawing, key))
    drawing.set_dpi(PNG_DPI)
    FigureCanvasAgg(drawing).print_png(files[1])
    return files


def svg_of(drawing: Figure, key: str) -> str:
    """The drawing as an SVG file. It is laid out once: what is drawn later keeps the places."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": key}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    drawing.set_layout_engine("none")
    return buffer.getvalue()


def inline(svg: str, key: str) -> str:
    """An SVG file as a part of a page: scalable, ids made its own, no metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    return re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)
