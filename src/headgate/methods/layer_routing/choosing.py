"""What data decides besides the weights: the threshold of inference, the mask, and which of router and mask is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from headgate.methods.costs import Reading
from headgate.methods.layer_routing import calibration, phases
from headgate.methods.layer_routing.budget import Budget
from headgate.methods.layer_routing.config import LEARNED, MASK_LOGIT, LayerRoutingConfig
from headgate.methods.layer_routing.fallback import Fallback
from headgate.methods.layer_routing.forward import RoutedForward
from headgate.methods.layer_routing.masks import best_mask, drawn_mask, greedy_mask
from headgate.methods.layer_routing.shares import Shares
from headgate.methods.stage import Stage
from headgate.methods.step import Step, real_tokens
from headgate.models.anatomy import Batch
from headgate.modules.layer_router import LayerRouter

Batches = Iterable[Batch]
SEARCH_BATCHES = 2
"""Batches that a zero-shot search reads."""


class Choosing:
    """Searches masks by running them, sets the threshold, and holds router and mask against each other.

    Args:
        config: of the method. execution: its forward. budget: whose threshold is set.
    """

    def __init__(self, config: LayerRoutingConfig, execution: RoutedForward, budget: Budget) -> None:
        self.config, self.execution, self.budget = config, execution, budget
        self._readings: list[Reading] = []

    def attach(self, shares: Shares, places: int, fixed: Tensor, fallback: Fallback | None) -> None:
        """For a model with ``places`` routable blocks; ``fixed`` ``[G]`` is the static mask, which a search fills in."""
        self.shares, self.fixed, self.fallback = shares, fixed, fallback
        self.places, self.closed = places, self.config.num_skipped(shares.num_blocks)

    @property
    def settled(self) -> bool:
        """Whether the run took its mask for good."""
        return self.fallback is not None and self.fallback.serves(training=True)

    def held(self, training: bool, step: Step | None) -> Tensor | None:
        """The mask ``[G]`` that a forward runs whatever the router says, or None; ``step``: of a trainer's training."""
        if step is not None and phases.phase_of(step.stage) == phases.SEARCH:
            stream = step.generator("layer_routing.search")
            return drawn_mask(self.places, self.closed, self.config.gates_per_block, stream)
        if self.fallback is None:
            return None
        adapts = step is not None and phases.phase_of(step.stage) == phases.ADAPT
        return self.fallback.mask if adapts or self.fallback.serves(training) else None

    # -- the mask -------------------------------------------------------------------------------------
    def zero_shot(self, batches: Batches) -> Tensor:
        """Gates ``[G]`` found block by block on the first batches."""
        return self._searched(list(islice(batches, SEARCH_BATCHES)), greedy_mask)

    def thorough(self, batches: Batches) -> Tensor:
        """Gates ``[G]`` of the least loss on the first 16,384 tokens, of all masks where they are few."""
        first = list(calibration.first_tokens(batches, calibration.CALIBRATION_TOKENS))
        return self._searched(first, best_mask)

    def _searched(self, batches: Sequence[Batch], search: Callable[..., Tensor]) -> Tensor:
        lengths = [real_tokens(batch).sum(-1).double() for batch in batches]
        tokens = sum(float(length.sum()) for length in lengths)
        pairs = sum(float((length * (length + 1) / 2).sum()) for length in lengths)

        def loss(mask: Tensor) -> float:
            share = float(self.shares.executed(mask, self.config, self.execution.engine))
            self._readings.append(Reading(tokens, pairs, share=share))
            return self.execution.loss(batches, mask)

        return search(loss, self.places, self.closed, self.config.gates_per_block)

    def hold(self, batches: Batches) -> Tensor:
        """Search the best mask, unless the settings name it, and serve it; what it is."""
        mask = self.thorough(batches) if self.config.skip is None else self.fixed.clone()
        if self.fallback is not None:
            self.fallback.hold(mask)
        else:
            self.fixed.copy_(mask)
        return mask

    def take_readings(self) -> Sequence[Reading]:
        """What was read since it was last asked: forwards that belong to no step are counted all the same."""
        readings, self._readings = self._readings, []
        return readings

    # -- the threshold, and who is served ---------------------------------------------------------------
    def calibrate(self, batches: Batches, target: float | None, tokens: int) -> None:
        """See ``LayerRouting.calibrate``; a router is taken for granted."""
        if self.settled or self.execution.routing == "removed":
            return
        if self.fallback is not None:
            self.fallback.withdraw()  # a served mask has no logits to set a threshold by
        target = target or self.config.calibration_target or self.config.target_utilization
        routes = self.execution.routes(calibration.first_tokens(batches, tokens))
        threshold = calibration.threshold_at(target, routes, self.config, self.shares)
        if threshold is not None:
            self.budget.set_threshold(threshold)

    def hear(self, batches: Batches, phase: str | None) -> None:
        """At a validation: in a search the best mask so far is served, then the one that was found; a router is judged."""
        if phase == phases.SEARCH:
            self.hold(batches)
        elif phase != phases.ADAPT:
            self.judge(batches)
        self._readings = []  # a validation is no part of training

    def judge(self, batches: Batches) -> None:
        """Set the threshold, and let router or mask be served; a run that settled on its mask stays there."""
        if self.settled:
            return
        first = list(calibration.first_tokens(batches, calibration.CALIBRATION_TOKENS))
        if self.config.calibrate_on == "validation" and self.config.policy in LEARNED:
            self.calibrate(first, None, calibration.CALIBRATION_TOKENS)
        if self.fallback is not None:
            searched = self.config.start == "mask"
            mask = self.fallback.mask.clone() if searched else self.zero_shot(first)
            self.fallback.choose(mask, partial(self.execution.loss, first))

    # -- where a stage begins -------------------------------------------------------------------------
    def begin(self, stage: Stage, probe: Batches | None, router: LayerRouter | None) -> None:
        """Search a mask, start the router at it, or take one of both for good, as the stage's phase has it."""
        config, phase = self.config, phases.phase_of(stage)
        held: Any = getattr(probe, "validation", None)
        phases.check_stage(config, stage, held)
        if config.policy == "static" and config.skip is None and config.search == "zero_shot":
            if not self.budget.updates and probe is not None:
                self.fixed.copy_(self.zero_shot(probe))
        elif phase == phases.ADAPT or (phase == phases.TRIAL and not config.adapt_share):
            self.hold(held)
        if phase == phases.TRIAL and router is not None and self.fallback is not None:
            router.start_at(self.fallback.mask, MASK_LOGIT)
        if phase == phases.SETTLE and self.fallback is not None:
            self.judge(held)
            self.fallback.settle()
