"""A text with every token on a ground as dark as it went deep: a drawing, for pages that take no HTML."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from headgate.experiments.records import Figures

COLUMNS, LINES = 88, 14
GROUND = LinearSegmentedColormap.from_list("depth", ["#ffffff", "#0072B2"])
SPACES = str.maketrans({"\n": "↵", "\t": " ", "\r": " "})


def token_heat(texts: Sequence[Figures], label: str) -> Figure:
    """``texts`` hold ``tokens`` and ``depth`` (a share of the blocks); the first LINES lines of each are drawn."""
    low, high = (pick(d for text in texts for d in text["depth"]) for pick in (min, max))
    blocks = [_laid_out(text["tokens"], text["depth"]) for text in texts]
    lines = sum(max(line for line, *_ in cells) + 2 for cells in blocks)
    drawing = Figure(figsize=(9.0, 0.19 * lines + 0.75), layout="constrained")
    axes = drawing.subplots()
    top = 0
    for cells in blocks:
        for line, column, text, depth in cells:
            share = (depth - low) / (high - low or 1)
            axes.add_patch(
                Rectangle((column, top + line), len(text), 1, color=GROUND(0.85 * share), linewidth=0)
            )
            axes.text(column, top + line + 0.72, text, family="monospace", fontsize=8.2, color="black" if share < 0.75 else "white")  # fmt: skip
        top += max(line for line, *_ in cells) + 2
    axes.set(xlim=(0, COLUMNS), ylim=(top, 0))
    axes.axis("off")
    axes.set_title(f"{label}: from {low:.0%} of the blocks (white) to {high:.0%}", fontsize=9, loc="left")
    return drawing


def _laid_out(tokens: Sequence[str], depth: Sequence[float]) -> list[tuple[int, int, str, float]]:
    """(line, column, text, depth) of the tokens that fit; a token longer than a line is cut."""
    line = column = 0
    cells = []
    for token, value in zip(tokens, depth, strict=True):
        text = token.translate(SPACES)[:COLUMNS]
        if column + len(text) > COLUMNS:
            line, column = line + 1, 0
        if line == LINES:
            break
        cells.append((line, column, text, value))
        column += len(text)
    return cells
