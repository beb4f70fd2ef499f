"""The rank law of a finished sweep over a rank (``headgate inspect SWEEP``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from headgate.errors import ConfigError
from headgate.experiments.records import SweepTable
from headgate.experiments.sweep_table import describe, headline
from headgate.methods.lora_experts.rank_law import Proposal, RankLaw, fit_rank_law, next_rank

RANKS = ("lora.r", "methods.lora_experts.r", "methods.lora_experts.new_r", "methods.schema_bank.rank")


class RankSweep(NamedTuple):
    """One law: of the runs that share ``others``. ``losses`` are means over seeds."""

    key: str
    others: str
    metric: str
    ranks: list[int]
    losses: list[float]
    law: RankLaw
    proposal: Proposal


def rank_sweeps(folder: Path) -> list[RankSweep]:
    """A law for every setting of the other swept keys.

    The metric is the table's first loss, or the stream's average. Raises ConfigError where the sweep varies no rank,
    or several, or has no loss.
    """
    table: SweepTable = json.loads((folder / "sweep.json").read_text())
    keys = [key for key in table["keys"] if key in RANKS]
    if len(keys) != 1:
        raise ConfigError(
            f"{folder} varies {', '.join(table['keys']) or 'nothing'}: a rank law needs exactly one of {', '.join(RANKS)}"
        )
    metrics = [m for m in headline(table) if m.endswith(("loss", "average")) and "accuracy" not in m]
    if not metrics:
        raise ConfigError(f"{folder} has no complete run with a loss: finish the sweep first")
    key, metric = keys[0], metrics[0]
    gathered: dict[str, list[tuple[int, float]]] = {}
    for group in table["groups"]:
        others = {k: v for k, v in group["overrides"].items() if k != key}
        if metric in group["mean"]:
            point = group["overrides"][key], group["mean"][metric]
            gathered.setdefault(describe(others) if others else "", []).append(point)
    found = []
    for label, points in gathered.items():
        ranks, losses = [rank for rank, _ in points], [loss for _, loss in points]
        law = fit_rank_law(ranks, losses)
        found.append(RankSweep(key, label, metric, ranks, losses, law, next_rank(law, ranks)))
    return found
