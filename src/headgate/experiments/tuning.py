"""What tuning chose, in words: a value on the edge of its grid is no optimum that was found, and is said to be none."""

from __future__ import annotations

from headgate.experiments.records import Content


def on_edge(tuned: Content) -> bool:
    """Whether the chosen value is the smallest or largest tried; False where the values are no numbers and have no order.

    ``tuned``: ``value``, and ``scores`` by the text of each value tried.
    """
    try:
        grid = sorted({float(text) for text in tuned["scores"]})
        return float(tuned["value"]) in (grid[0], grid[-1])
    except (TypeError, ValueError):
        return False


def tuned_to(tuned: Content) -> str:
    """``0.005``, or ``0.01 (the edge of its grid)``."""
    value = tuned["value"]
    text = f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
    return f"{text} (the edge of its grid)" if on_edge(tuned) else text


ADVICE = (
    "an optimum on the edge of a grid is not bracketed: give compare.tune.values beyond it, for every arm"
)
