"""Taking a bank away without losing what it carried: how it leaves in the last stage, and what its absence costs.

``abrupt`` (the paper): present to the last step, absent afterwards. ``fade``: its part is scaled from 1 to 0 over the
first four fifths of the last stage. ``dropout``: absent in half of that stage's steps. ``distil``: absent throughout,
while the same model with the bank, as it stands, teaches the LoRA. The last three are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from headgate.methods.schema_bank.config import Routing, SchemaBankConfig
from headgate.methods.step import Step
from headgate.methods.teacher import distilled
from headgate.models.anatomy import Anatomy, model_inputs
from headgate.models.aside import look_aside
from headgate.models.sharding import head_tensors
from headgate.models.surgery import head_bypassed
from headgate.modules.fused_head import chunked_head_loss
from headgate.ops.randomness import generator

FADED_AT = 0.8
"""Share of the last stage after which a fading bank is gone: the LoRA then trains as it will be used."""
ABSENT = 0.5


class Removal:
    """How much of the bank is there, step by step; all of it follows from the step, so there is nothing to save.

    Attributes:
        scale: of the bank's part in the forwards of this step: 1 as trained, 0 absent.
        losses: the last validation's loss ``with`` the bank and ``without`` it, in nats a token; empty before one.
    """

    def __init__(self, config: SchemaBankConfig) -> None:
        self.config = config
        self.scale = 1.0
        self.losses: dict[str, float] = {}
        self._forced: Routing | None = None

    def begin(self, step: Step) -> None:
        """Set ``scale`` for a micro-batch."""
        self.scale = self._scale(step) if step.stage.options.get("removing") else 1.0

    def _scale(self, step: Step) -> float:
        if self.config.removal == "fade":
            return max(0.0, 1 - step.stage_step / (FADED_AT * step.stage_steps))
        if self.config.removal == "dropout":
            # One draw an optimizer step, equal on every rank: ranks sum the statistics of a bank that is there.
            # The first step of a stage keeps it, so that a parameter without any gradient is still found.
            stream = generator(step.seed, step.global_step, "schema_bank.removal")
            return float(step.stage_step == 0 or float(torch.rand((), generator=stream)) >= ABSENT)
        return 0.0 if self.config.removal == "distil" else 1.0

    def routing(self, training: bool, chosen: Routing) -> Routing:
        """What a forward runs: in training the bank unless it is absent, at evaluation what was chosen."""
        if self._forced is not None:
            return self._forced
        if training:
            return "on" if self.scale > 0 else "removed"
        return chosen

    def mixed(self, hidden: Tensor, output: Tensor, training: bool) -> Tensor:
        """``(1 - scale) h + scale h'``: of ``add`` the bank's part is scaled, of ``replace`` the block's own returns."""
        if not training or self._forced is not None or self.scale in (0.0, 1.0):
            return output
        return hidden + self.scale * (output - hidden)

    @contextmanager
    def forced(self, routing: Routing) -> Iterator[None]:
        """Inside, every forward runs ``routing``."""
        before, self._forced = self._forced, routing
        try:
            yield
        finally:
            self._forced = before

    def telemetry(self) -> dict[str, Tensor]:
        """``schema/bank/scale``, and the last validation's two losses."""
        losses = {f"schema/bank/loss_{name}": torch.tensor(value) for name, value in self.losses.items()}
        return {"schema/bank/scale": torch.tensor(self.scale), **losses}

    # -- distillation ---------------------------------------------------------------------------------
    def teaches(self, step: Step) -> bool:
        return self.config.removal == "distil" and bool(step.stage.options.get("removing"))

    def distillation(self, anatomy: Anatomy, step: Step) -> Tensor:
        """``KL(with the bank || without)`` over labelled tokens; the teacher's pass is without dropout or a graph."""
        assert step.hidden is not None
        model, inputs = anatomy.model, model_inputs(step.batch, labels=False)
        with look_aside(model), self.forced("on"), head_bypassed(anatomy.head) as captured:
            model(**inputs, use_cache=False)
        return distilled(anatomy, step.hidden, captured[-1], step.labels, 1.0)

    # -- validation -----------------------------------------------------------------------------------
    def validate(self, anatomy: Anatomy, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Measure ``losses`` on a validation's batches, which already lie on the device: two forwards of each."""
        sums, tokens = {"with": 0.0, "without": 0.0}, 0
        for batch in batches:
            tokens += int((batch["labels"][..., 1:] != -100).sum())
            for name, routing in (("with", "on"), ("without", "removed")):
                with self.forced(routing):  # type: ignore[arg-type]
                    sums[name] += float(_summed_loss(anatomy, batch))
        self.losses = {name: total / max(1, tokens) for name, total in sums.items()}


def _summed_loss(anatomy: Anatomy, batch: Mapping[str, Tensor]) -> Tensor:
    with look_aside(anatomy.model), head_bypassed(anatomy.head) as captured:
        anatomy.model(**model_inputs(batch, labels=False), use_cache=False)
        weight_VH, bias_V = head_tensors(anatomy)
        return chunked_head_loss(
            captured[-1],
            weight_VH,
            batch["labels"],
            bias=bias_V,
            softcap=anatomy.softcap,
            reduction="sum",
        )
