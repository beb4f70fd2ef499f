"""What a report is about: arms, each with its runs by seed, whatever they came from.

Nothing is computed that the runs do not hold; the statistics of a comparison are those of its ``comparison.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headgate.experiments.metric import Metric
from headgate.experiments.records import ComparisonTable, Content, Contrast, Environment, Figures, RunRecord
from headgate.experiments.run_directory import RunDirectory

Unit = Literal["steps", "tokens", "seconds", "flops", "accepted"]
CLOCKS = {
    "tokens": "trained_tokens",
    "seconds": "trained_tokens",
    "flops": "flops",
    "accepted": "gate/accepted_steps",
}


@dataclass(frozen=True)
class Run:
    """One run directory, read as it is: its recipe is not validated, so that an older run still has a report."""

    directory: RunDirectory
    most_rows: int = 2_000
    """Telemetry rows that are read, evenly spaced, besides every validation: a figure shows no more."""

    @cached_property
    def recipe(self) -> Content:
        return self.directory.recipe_content()

    @cached_property
    def environment(self) -> Environment:
        return self.directory.environment()

    @cached_property
    def result(self) -> RunRecord | None:
        return self.directory.result() if self.directory.status == "complete" else None

    @cached_property
    def rows(self) -> list[Figures]:
        return self.directory.thinned_metrics(self.most_rows)

    @property
    def status(self) -> str:
        return self.directory.status

    @property
    def on_disk(self) -> bool:
        """Whether its folder is here."""
        return True

    def value(self, metric: Metric) -> float | None:
        """Its figure, where it is complete and has it."""
        found = _dig(self.result, metric.path)
        return None if found is None else float(found)

    @property
    def training(self) -> Figures:
        return {} if self.result is None else self.result["training"]

    @property
    def methods(self) -> list[str]:
        return list(self.recipe.get("methods") or {})

    def series(self, name: str) -> tuple[list[float], list[Any]]:
        """Steps and values of one telemetry name, where it was logged."""
        found = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return [float(step) for step, _ in found], [value for _, value in found]

    def clock(self, steps: Sequence[float], unit: Unit) -> list[float]:
        """Steps as trained tokens, training seconds, FLOPs or accepted micro-batches; between two logs, in
        proportion. Without a gate every micro-batch is accepted.
        """
        if unit == "accepted" and not self.series("gate/accepted_steps")[0]:
            per_step = self.recipe["training"].get("gradient_accumulation_steps", 1)
            return [step * per_step for step in steps]
        if unit == "steps":
            return list(steps)
        logged, spent = self.series(CLOCKS[unit])
        if unit == "seconds":
            rates = self.series("tokens_per_second")[1]
            # a run whose first batches a gate rejected has trained no token yet, at no rate
            spent = [t / rate if rate else 0.0 for t, rate in zip(spent, rates, strict=True)]
        return [float(x) for x in np.interp(steps, [0.0, *logged], [0.0, *spent])] if logged else []


@dataclass(frozen=True)
class Arm:
    """One condition: its runs by seed. An arm without training has one run at every seed."""

    name: str
    runs: Mapping[int, Run]

    @property
    def distinct(self) -> list[Run]:
        return list({run.directory.path: run for run in self.runs.values()}.values())

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs.values() for name in run.methods))

    @property
    def trained(self) -> bool:
        """Whether any of its runs took a step; the untouched base model did not."""
        return any(self.training("steps"))

    def values(self, metric: Metric) -> dict[int, float]:
        """The metric by seed, of the runs that are complete and have it."""
        found = {seed: run.value(metric) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def training(self, name: str) -> list[float]:
        """One figure of ``result.json``'s training section over the distinct runs that have it."""
        return [float(run.training[name]) for run in self.distinct if run.training.get(name) is not None]


@dataclass(frozen=True)
class Study:
    """What one report shows. ``summary`` is the finished comparison's own table; None for anything else."""

    kind: Literal["comparison", "run", "runs", "map"]
    name: str
    folder: Path
    metric: Metric | None
    arms: Sequence[Arm]
    seeds: Sequence[int] = ()
    baseline: str | None = None
    summary: ComparisonTable | None = None
    missing: Sequence[str] = ()
    varied: Sequence[str] = field(default=())
    cells: Mapping[str, ComparisonTable] = field(default_factory=dict)
    """Of a map: the finished comparisons by name, each as its ``comparison.json`` has it."""

    @property
    def runs(self) -> list[Run]:
        return list({run.directory.path: run for arm in self.arms for run in arm.runs.values()}.values())

    @property
    def contrasts(self) -> Mapping[str, Contrast]:
        return {} if self.summary is None else self.summary["contrasts"]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(name for arm in self.arms for name in arm.methods))

    @property
    def model(self) -> str:
        of_runs = [run.recipe.get("model", {}).get("name_or_path", "?") for run in self.runs]
        names = dict.fromkeys([*of_runs, *(cell["model"] for cell in self.cells.values())])
        return ", ".join(names)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def using(self, method: str) -> list[Arm]:
        return [arm for arm in self.arms if method in arm.methods]


def _dig(node: object, path: Sequence[str]) -> Any:
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node
