"""LwF: a baseline against forgetting. On a new skill's rows the model goes on saying what it said before the skill.

    loss += weight mean_n T^2 KL(p_before || p)        p_before: the model as it was when the skill began

Li and Hoiem 2016, "Learning without forgetting", equations 2 and 3, with Hinton's T^2 and, as a language model has one head,
the same output for old and new skills. Nothing is kept of earlier skills but the trained tensors as they were. During the first
skill nothing is held: the base has learned no skill yet.

Cost: one forward without a graph a micro-batch and the head on its labelled tokens (twice, for they are computed again in the
backward); a second copy of what trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from headgate.config import StrictConfig, build_config
from headgate.errors import ConfigError
from headgate.methods.continual import ContinualBaseline
from headgate.methods.continual_config import LwFConfig
from headgate.methods.costs import StepCost
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import Step
from headgate.methods.teacher import distilled
from headgate.models.anatomy import Anatomy, Batch, model_inputs
from headgate.models.aside import look_aside
from headgate.models.surgery import head_bypassed
from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure


class Before(FixedPrecision):
    """``values`` ``[P]``: what trains, end to end, as it was when the skill began; ``skills``: how many came before, on the
    host."""

    stays_on_cpu = frozenset({"skills"})
    values: Tensor
    skills: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(size))
        self.register_buffer("skills", torch.zeros((), dtype=torch.long))


@contextmanager
def holding(parameters: Sequence[nn.Parameter], values: Tensor) -> Iterator[None]:
    """Inside, the parameters have these values, end to end; a graph made before keeps the storage that it read."""
    own = [p.data for p in parameters]
    pieces = values.split([p.numel() for p in parameters])
    try:
        for p, piece in zip(parameters, pieces, strict=True):
            p.data = piece.view_as(p).to(p.dtype)
        yield
    finally:
        for p, data in zip(parameters, own, strict=True):
            p.data = data


class LwF(ContinualBaseline):
    """Learning without forgetting over the parameters that the recipe trains."""

    name = "lwf"
    Config = LwFConfig
    attach_order = 55
    host_reads: ClassVar[float] = 0.0
    neutral: ClassVar[Mapping[str, object]] = {"weight": 0.0}
    telemetry_names = ("lwf/<part>",)
    citation = (
        "@inproceedings{li2016lwf,\n"
        "  title={Learning without forgetting}, author={Li, Zhizhong and Hoiem, Derek},\n"
        "  booktitle={ECCV}, year={2016}\n}"
    )

    def __init__(self, config: StrictConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.before = Before(0)
        self._said: Tensor | None = None

    def check_run(self, max_steps: int) -> None:
        super().check_run(max_steps)
        self.require_fixed_head()

    # -- installation and state -------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy) -> None:
        """Room for a copy of what trains. A model that is loaded to be used has nothing that does: nobody is asked then."""
        super().attach(anatomy)
        held = len(self.before.values)
        if self.size and not held:
            self.before = Before(self.size).to(self.trained[0].device)
        elif self.size and self.size != held:
            raise ConfigError(f"lwf was saved over {held} trained parameters, this model trains {self.size}")

    def structure(self) -> Structure:
        return {**super().structure(), "parameters": len(self.before.values)}

    @classmethod
    def from_structure(cls, structure: Structure) -> LwF:
        made = cls(build_config(cls.Config, structure["config"]))
        made.before = Before(structure["parameters"])
        return made

    # -- training ---------------------------------------------------------------------------------------
    @torch.no_grad()
    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        if scheduled.index:
            self.before.values.copy_(torch.cat([p.reshape(-1).float() for p in self.trained]))
            self.before.skills.add_(1)

    @property
    def teaches(self) -> bool:
        return bool(self.config.weight) and int(self.before.skills) > 0

    def on_step_start(self, step: Step) -> None:
        """The old model reads the batch before its own forward: whatever another method keeps of a step's forward until its
        backward is then of the batch. A batch that a gate rejects has paid for it."""
        self._said = None
        if not self.teaches:
            return
        assert self.anatomy is not None
        inputs = model_inputs(step.batch, labels=False)
        with (
            holding(self.trained, self.before.values),
            look_aside(self.anatomy.model),
            head_bypassed(self.anatomy.head) as captured,
        ):
            self.anatomy.model(**inputs, use_cache=False)
        self._said = captured.pop()

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if self._said is None:
            return {}
        assert self.anatomy is not None and step.hidden is not None
        pull = distilled(self.anatomy, step.hidden, self._said, step.labels, self.config.temperature)
        return {"lwf": self.config.weight * pull}

    @property
    def reads_hidden(self) -> bool:
        return bool(self.config.weight)

    def cost(self, step: Step) -> StepCost:
        """The old model's blocks; of an accepted batch the head on both sides, again in the backward, and its gradient."""
        if not self.teaches:
            return StepCost()
        return StepCost(forwards=1.0, heads=4.0 if step.accepted else -1.0)

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        self._said = None
        return {}

    def summary(self) -> Mapping[str, object]:
        return {"lwf/skills": int(self.before.skills)}
