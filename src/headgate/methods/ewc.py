"""EWC: a baseline against forgetting. What mattered to earlier skills is held where it was.

After each skill the parameters are anchored, and moving them costs as much as the earlier skills' loss would rise,
to second order with a diagonal Fisher information:

    loss += lambda / 2  sum_j F_j (theta_j - theta*_j)^2
    during a skill:      G <- beta G + (1 - beta) n g^2        g: gradient of the batch's mean loss, n: its tokens
    at its end:          F <- gamma F + G,  theta* <- theta

Kirkpatrick et al. 2017, equation 3, in its online form (Schwarz et al. 2018, section 3.2) with the running Fisher of
EWC++ (Chaudhry et al. 2018, section 4.1): no second pass over the data, three numbers per trained parameter in all.
Deviations: n g^2 in place of per-example gradients (an estimate of a token's Fisher where the mean gradient is
small); it acts on whatever the recipe trains besides methods: the PEFT adapter, or with ``lora: null`` the model.

Cost: a few vector operations per step on the trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from headgate.config import StrictConfig, build_config
from headgate.errors import ConfigError
from headgate.methods.continual import ContinualBaseline
from headgate.methods.continual_config import EWCConfig
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch
from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure


class FisherMemory(FixedPrecision):
    """Three numbers per trained parameter, all parameters end to end: F, G and theta*; and two counters on the host."""

    stays_on_cpu = frozenset({"updates", "skills"})

    fisher: Tensor
    running: Tensor
    anchor: Tensor
    updates: Tensor
    skills: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("fisher", "running", "anchor"):
            self.register_buffer(name, torch.zeros(size))
        for name in ("updates", "skills"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))


class EWC(ContinualBaseline):
    """Elastic weight consolidation over the parameters that the recipe trains."""

    name = "ewc"
    Config = EWCConfig
    attach_order = 50
    neutral: ClassVar[Mapping[str, object]] = {"strength": 0.0}
    telemetry_names = ("ewc/<part>",)
    citation = (
        "@article{kirkpatrick2017ewc,\n"
        "  title={Overcoming catastrophic forgetting in neural networks}, author={Kirkpatrick, James and others},\n"
        "  journal={PNAS}, volume={114}, number={13}, year={2017}\n}"
    )

    def __init__(self, config: StrictConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.memory = FisherMemory(0)

    # -- installation and state -------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy) -> None:
        """Room for three numbers a trained parameter. A model that is loaded to be used has none: the penalty is then idle."""
        super().attach(anatomy)
        held = self.memory.fisher.numel()
        if self.size and not held:
            self.memory = FisherMemory(self.size).to(self.trained[0].device)
        elif self.size and self.size != held:
            raise ConfigError(f"ewc was saved over {held} trained parameters, this model trains {self.size}")

    def structure(self) -> Structure:
        return {**super().structure(), "parameters": self.memory.fisher.numel()}

    @classmethod
    def from_structure(cls, structure: Structure) -> EWC:
        made = cls(build_config(cls.Config, structure["config"]))
        made.memory = FisherMemory(structure["parameters"])
        return made

    # -- training ---------------------------------------------------------------------------------------
    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        """The skill before this one is over: add its Fisher, anchor the parameters."""
        memory = self.memory
        if scheduled.index == 0 or int(memory.updates) == 0:
            return
        unbiased = memory.running / (1 - self.config.beta ** int(memory.updates))
        memory.fisher.mul_(self.config.decay).add_(unbiased)
        memory.anchor.copy_(_flat(p.detach() for p in self.trained))
        memory.running.zero_()
        memory.updates.zero_()
        memory.skills.add_(1)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if int(self.memory.skills) == 0:
            return {}
        moved = _flat(self.trained) - self.memory.anchor
        return {"ewc": 0.5 * self.config.strength * (self.memory.fisher * moved.square()).sum()}

    @torch.no_grad()
    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """Move the running Fisher by the window's gradient, the penalty's own share taken out."""
        gradients = [p.grad for p in self.trained]
        if not step.is_window_end or not step.accepted or any(g is None for g in gradients):
            return {}
        memory = self.memory
        gradient = _flat(g for g in gradients if g is not None)
        if int(memory.skills):
            moved = _flat(self.trained) - memory.anchor
            gradient = gradient - self.config.strength * memory.fisher * moved
        tokens = step.num_tokens if step.window_tokens is None else step.window_tokens
        memory.running.lerp_(gradient.square() * tokens, 1 - self.config.beta)
        memory.updates.add_(1)
        return {}

    def summary(self) -> Mapping[str, object]:
        return {"ewc/skills": int(self.memory.skills)}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors])
