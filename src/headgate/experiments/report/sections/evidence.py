"""Beside a comparison too small for a verdict: what Headgate's own comparisons of the same methods found."""

from __future__ import annotations

from headgate.experiments.evidence import findings
from headgate.experiments.report.content import Block, Table, Text
from headgate.experiments.report.study import Study
from headgate.experiments.statistics import MINIMUM_SEEDS


def shipped_evidence(study: Study) -> list[Block]:
    """Empty where the comparison has seeds enough, or where nothing is known of its methods."""
    if study.kind != "comparison" or len(study.seeds) >= MINIMUM_SEEDS:
        return []
    rows = findings(study.methods)
    if not rows:
        return []
    return [
        Text(
            "Not from this comparison: Headgate's own, each of at least three seeds, with every arm's learning rate chosen "
            "alike. Differences of losses; below zero speaks for the first arm. `EXPERIMENTS.md` has the tables."
        ),
        Table(
            "Shipped with Headgate",
            ["question", "method", "contrast", "difference [95%]", "seeds", "model", "verdict"],
            [
                [
                    row.question,
                    row.method,
                    row.contrast,
                    row.difference,
                    str(row.seeds),
                    row.model,
                    row.verdict,
                ]
                for row in rows
            ],
            (3, 4),
        ),
    ]
