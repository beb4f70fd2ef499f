"""DER++: a baseline against forgetting. Earlier skills' rows are replayed with the logits that the model once gave on them.

    loss += alpha mean_{n,v} (z - z*)^2  +  beta CE        z: logits now, z*: those kept; two draws from the memory

Buzzega et al. 2020, "Dark experience for general continual learning", equation 6, as means over labelled tokens and the
vocabulary. What is kept of z* is what entered the head, in fp16: a head that does not train makes the same logits of it, whatever
the vocabulary. Deviations: ``per_skill`` documents of each segment (methods/rehearsal.py), their logits as they are when the
segment is over, in place of one reservoir with logits along the way; the memory is read in evaluation mode (no dropout).

Cost: one forward and one backward over 2 ``rows`` documents a micro-batch, the head twice; at a segment's end one forward over
its documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from headgate.config import StrictConfig, build_config
from headgate.methods.continual import ContinualBaseline
from headgate.methods.continual_config import DERPPConfig
from headgate.methods.costs import Reading
from headgate.methods.rehearsal import Rehearsal
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import IGNORE_INDEX, Step
from headgate.models.anatomy import Batch
from headgate.models.aside import evaluating, look_aside
from headgate.models.sharding import head_tensors
from headgate.models.surgery import head_bypassed
from headgate.modules.fused_head import chunked_head_loss
from headgate.modules.structure import Structure
from headgate.ops.distillation import logit_matching_loss
from headgate.ops.head_loss import shifted_rows

ROWS_AT_ONCE = 16
"""Documents in a forward that only looks."""


class DERPP(ContinualBaseline):
    """Dark experience replay with labels over the parameters that the recipe trains."""

    name = "derpp"
    Config = DERPPConfig
    attach_order = 60
    host_reads: ClassVar[float] = 0.0
    neutral: ClassVar[Mapping[str, object]] = {"alpha": 0.0, "beta": 0.0}
    telemetry_names = ("derpp/<part>",)
    citation = (
        "@inproceedings{buzzega2020dark,\n"
        "  title={Dark experience for general continual learning: a strong, simple baseline},\n"
        "  author={Buzzega, Pietro and others}, booktitle={NeurIPS}, year={2020}\n}"
    )

    def __init__(self, config: StrictConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.rehearsal = Rehearsal(self.name, self.config.per_skill)
        self._pull: tuple[dict[str, Tensor], Sequence[Tensor]] | None = None

    def check_run(self, max_steps: int) -> None:
        super().check_run(max_steps)
        self.require_fixed_head()

    # -- state ------------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        return {**super().structure(), "memory": self.rehearsal.memory.structure()}

    def restore(self, structure: Structure) -> None:
        self.rehearsal.memory.restore(structure["memory"])

    @classmethod
    def from_structure(cls, structure: Structure) -> DERPP:
        made = cls(build_config(cls.Config, structure["config"]))
        made.restore(structure)
        return made

    # -- training ---------------------------------------------------------------------------------------
    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        """The segment before this one is over: its documents get their logits; then those of this one are kept."""
        if self.config.alpha and scheduled.index:
            self._look(scheduled.index - 1)
        self.rehearsal.keep(scheduled, probe)

    def _look(self, segment: int) -> None:
        """What enters the head now on a segment's documents."""
        assert self.anatomy is not None
        places = (self.rehearsal.memory.owner == segment).nonzero().flatten()
        device = next(self.anatomy.model.parameters()).device
        with look_aside(self.anatomy.model), head_bypassed(self.anatomy.head) as captured:
            for some in places.split(ROWS_AT_ONCE):
                batch = self.rehearsal.batch(some, device, heads=0.0, trained=False)
                self.anatomy.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
                self.rehearsal.memory.know(some, captured.pop())

    def on_step_start(self, step: Step) -> None:
        """The memory's losses and their gradients, before the batch's own forward: whatever another method keeps of a step's
        forward until its backward is then of the batch."""
        self._pull = None
        count = self.config.rows
        wanted = [w for w in (self.config.alpha, self.config.beta) if w]
        places = self.rehearsal.draw(step.scheduled.index, count * len(wanted), step.generator("derpp"))
        trained = [p for p in self.trained if p.requires_grad]
        if wanted and places is not None and trained:
            parts = self._memory_losses(step.model, places)
            self._pull = (
                {name: part.detach() for name, part in parts.items()},
                torch.autograd.grad(
                    torch.stack(list(parts.values())).sum(),
                    trained,
                    allow_unused=True,
                    materialize_grads=True,
                ),
            )

    def _memory_losses(self, model: nn.Module, places: Tensor) -> dict[str, Tensor]:
        """``derpp_logits`` over the first draw, ``derpp_labels`` over the second, weighted; one forward for both."""
        assert self.anatomy is not None
        config = self.config
        head, softcap = self.anatomy.head, self.anatomy.softcap
        batch = self.rehearsal.batch(places, self.trained[0].device, heads=1.0, trained=True)
        labels = batch.pop("labels")
        with evaluating(model), torch.enable_grad(), head_bypassed(head) as captured:
            model(**batch, use_cache=False)
        hidden = captured.pop()
        first = (len(places) + 1) // 2 if config.alpha and config.beta else len(places)
        dark, light = (slice(first), slice(first, None)) if config.alpha else (slice(0), slice(None))
        (weight, bias), parts = head_tensors(self.anatomy), {}
        if config.alpha:
            kept = self.rehearsal.memory.states[places[dark], : hidden.shape[1]].to(
                hidden.device, hidden.dtype
            )
            now_NH, then_NH = (shifted_rows(h, labels[dark], IGNORE_INDEX)[0] for h in (hidden[dark], kept))
            distance = logit_matching_loss(now_NH, then_NH, weight, bias, softcap=softcap)
            parts["derpp_logits"] = config.alpha * distance
        if config.beta and len(labels[light]):
            parts["derpp_labels"] = config.beta * chunked_head_loss(
                hidden[light], weight, labels[light], bias=bias, softcap=softcap
            )
        return parts

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Tangents of the memory's losses: equal to them in value and in gradient."""
        if self._pull is None:
            return {}
        values, gradients = self._pull
        trained = [p for p in self.trained if p.requires_grad]
        linear = torch.stack([(g * p).sum() for g, p in zip(gradients, trained, strict=True)]).sum()
        name, *others = values
        return {name: values[name] + (linear - linear.detach()), **{other: values[other] for other in others}}

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        self._pull = None
        return {}

    def take_readings(self) -> Sequence[Reading]:
        return self.rehearsal.take_readings()

    def summary(self) -> Mapping[str, object]:
        return {"derpp/documents": len(self.rehearsal.memory)}
