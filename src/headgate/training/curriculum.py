"""Stages -> what is trainable now, and the optimizer's parameter groups."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from headgate.errors import ConfigError
from headgate.methods.stage import ScheduledStage, Stage, schedule_stages


class Curriculum:
    """The stages of one run, laid over its optimizer steps, and where the run stands in them."""

    def __init__(self, stages: Sequence[Stage], max_steps: int) -> None:
        self.scheduled = schedule_stages(stages, max_steps)
        self.index = 0

    @property
    def current(self) -> ScheduledStage:
        return self.scheduled[self.index]

    def is_over(self, global_step: int) -> bool:
        """Whether optimizer step ``global_step`` belongs to a later stage than the current one."""
        return global_step >= self.current.stop and self.index + 1 < len(self.scheduled)

    def check_groups(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Every group is trained by some stage, and every stage names groups that exist."""
        trained = {group for scheduled in self.scheduled for group in scheduled.stage.train}
        for group in sorted(trained - set(groups)):
            close = difflib.get_close_matches(group, groups, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"groups are {', '.join(sorted(groups))}"
            raise ConfigError(f"a stage trains {group!r}, which no method and no adapter has: {hint}")
        for group, parameters in groups.items():
            if parameters and group not in trained:
                raise ConfigError(
                    f"parameter group {group!r} is trained by no stage: name it in a stage's `train`, or turn "
                    "its method off"
                )

    def apply(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """``requires_grad`` for exactly the tensors that the current stage trains."""
        for name, parameters in groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name in self.current.stage.train)
                if name not in self.current.stage.train:
                    parameter.grad = None

    def optimizer_groups(
        self, groups: Mapping[str, Sequence[nn.Parameter]], no_decay: set[int], weight_decay: float
    ) -> list[dict[str, object]]:
        """AdamW groups of the current stage: one per (group, decayed or not), each with its own peak rate."""
        made: list[dict[str, object]] = []
        for name, rate in self.current.stage.train.items():
            decayed = [p for p in groups[name] if id(p) not in no_decay]
            plain = [p for p in groups[name] if id(p) in no_decay]
            for parameters, decay in ((decayed, weight_decay), (plain, 0.0)):
                if parameters:
                    made.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": name})
        return made
