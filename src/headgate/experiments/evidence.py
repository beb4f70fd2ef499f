"""The evidence that this repository ships: one verdict a row, from comparisons of three seeds or more.

``evidence.json`` is written by ``scripts/collect_evidence.py`` from ``benchmarks/results/*.comparison.json``; the same
script writes the table at the top of EXPERIMENTS.md.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Finding:
    """A question, the contrast that answers it (``first - second`` of ``metric``, 95% t interval) and the verdict."""

    method: str
    question: str
    contrast: str
    metric: str
    mean: float
    low: float
    high: float
    seeds: int
    model: str
    verdict: str
    command: str

    @property
    def difference(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def findings(methods: Collection[str] | None = None) -> list[Finding]:
    """The shipped findings, of ``methods`` only where given."""
    rows = json.loads(files("headgate.experiments").joinpath("evidence.json").read_text())
    return [Finding(**row) for row in rows if methods is None or row["method"] in methods]
