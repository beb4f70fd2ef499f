"""A-GEM: a baseline against forgetting. A step may not raise the loss on rows kept of earlier skills, to first order.

Before every optimizer step a batch is drawn from the memory of earlier skills, and where the step's gradient g points
against that batch's gradient r, it is projected:

    g <- g - (g . r / r . r) r        where g . r < 0

Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM", equation 11. The memory holds ``per_skill`` documents of each
segment (methods/rehearsal.py) and is consulted from the next segment on. Deviations: r is taken in evaluation mode (no
dropout); g and r are those of what the recipe trains besides methods.

It changes the gradients of tensors that are not its own, after every other method has seen them: ``attach_order`` is the last.

Cost: one forward and one backward over ``rows`` documents an optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from headgate.config import StrictConfig, build_config
from headgate.methods.continual import ContinualBaseline
from headgate.methods.continual_config import AGEMConfig
from headgate.methods.costs import Reading
from headgate.methods.rehearsal import Rehearsal
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import Step
from headgate.models.anatomy import Batch
from headgate.models.aside import evaluating
from headgate.modules.structure import Structure
from headgate.ops.gradient_projection import projection_coefficient
from headgate.ops.randomness import generator


class AGEM(ContinualBaseline):
    """Averaged gradient episodic memory over the parameters that the recipe trains."""

    name = "agem"
    Config = AGEMConfig
    attach_order = 90
    host_reads: ClassVar[float] = 0.0
    telemetry_names = ("agem/conflict",)
    citation = (
        "@inproceedings{chaudhry2019agem,\n"
        "  title={Efficient lifelong learning with {A-GEM}}, author={Chaudhry, Arslan and others},\n"
        "  booktitle={ICLR}, year={2019}\n}"
    )

    def __init__(self, config: StrictConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.rehearsal = Rehearsal(self.name, self.config.per_skill)

    # -- state ------------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        return {**super().structure(), "memory": self.rehearsal.memory.structure()}

    def restore(self, structure: Structure) -> None:
        self.rehearsal.memory.restore(structure["memory"])

    @classmethod
    def from_structure(cls, structure: Structure) -> AGEM:
        made = cls(build_config(cls.Config, structure["config"]))
        made.restore(structure)
        return made

    # -- training ---------------------------------------------------------------------------------------
    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        self.rehearsal.keep(scheduled, probe)

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """At a window's end, when its gradient is whole: project it. The same batch is drawn on every rank."""
        moved = [p for p in self.trained if p.grad is not None]
        if not step.is_window_end or not moved:
            return {}
        stream = generator(step.seed, step.global_step, "agem")
        places = self.rehearsal.draw(step.scheduled.index, self.config.rows, stream)
        if places is None:
            return {}
        reference = self.reference(step.model, places, moved)
        gradient = torch.cat([p.grad.reshape(-1).float() for p in moved if p.grad is not None])
        coefficient = projection_coefficient(gradient, torch.cat([r.reshape(-1).float() for r in reference]))
        for p, r in zip(moved, reference, strict=True):
            assert p.grad is not None
            p.grad.sub_((coefficient * r).to(p.grad.dtype))
        return {"agem/conflict": (coefficient < 0).float()}

    def reference(self, model: nn.Module, places: Tensor, moved: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        """The gradient of the mean loss over kept documents; zeros where a tensor has no part in it."""
        batch = self.rehearsal.batch(places, moved[0].device, heads=1.0, trained=True)
        with (
            evaluating(model),
            torch.enable_grad(),
        ):  # other methods record training forwards: this is none of theirs
            loss = model(**batch, use_cache=False).loss
        return torch.autograd.grad(loss, moved, allow_unused=True, materialize_grads=True)

    def take_readings(self) -> Sequence[Reading]:
        return self.rehearsal.take_readings()

    def summary(self) -> Mapping[str, object]:
        return {"agem/documents": len(self.rehearsal.memory)}
