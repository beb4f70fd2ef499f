"""The table of laws, in the order in which they are entered."""

from __future__ import annotations

from collections.abc import Callable

from headgate.testing.case import Case

Law = Callable[[Case], None]
LAWS: dict[str, Law] = {}


def law(check: Law) -> Law:
    """Enter a law under its function's name."""
    LAWS[check.__name__.replace("_", " ")] = check
    return check
