"""A run of which only the comparison's own table is left: its figure, its evaluation, what its arm took."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from headgate.experiments.metric import Metric
from headgate.experiments.records import ArmRow, Content, Environment, Figures, RunRecord
from headgate.experiments.report.study import Run


@dataclass(frozen=True)
class TabledRun(Run):
    """As ``comparison.json`` tells it: no curves, no items, no recipe; costs are its arm's medians over seeds.

    Attributes:
        arm: the arm's entry. place: of the run among the seeds. model, seed: of the comparison.
    """

    arm: ArmRow = field(kw_only=True)
    place: int = 0
    model: str = ""
    seed: int = 0

    @cached_property
    def recipe(self) -> Content:
        return {"model": {"name_or_path": self.model}, "seed": self.seed}

    @cached_property
    def environment(self) -> Environment:
        return {}

    @cached_property
    def result(self) -> RunRecord:
        training = {name: value for name, value in self.arm["cost"].items() if value is not None}
        return {"training": training, "evaluation": self.arm["metrics"][self.place]}

    @cached_property
    def rows(self) -> list[Figures]:
        return []

    @property
    def status(self) -> str:
        return "complete, its folder is not here"

    @property
    def on_disk(self) -> bool:
        return False

    def value(self, metric: Metric) -> float:
        return float(self.arm["values"][self.place])
