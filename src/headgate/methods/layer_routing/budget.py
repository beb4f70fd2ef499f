"""Budget: the price of depth, and what it remembers: dual variable, threshold, baseline, utilization.

    lagrangian   lambda (u - t) + rho / 2 (u - t)^2,   lambda <- lambda + eta (u - t)
    penalty      lambda sum_l w_l mean g_l
    target       kappa (u - t)^2
    exact        none: gates open as far as the budget goes (ops.exact_budget)
    REINFORCE    -(baseline - cost) log p(g), cost = CE + price; the price of ``penalty`` is lambda per open block

All of it moves once an optimizer step, by the mean over the accumulation window's accepted micro-batches and over
ranks: how a batch is cut into micro-batches changes nothing.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from headgate.methods.layer_routing.config import LEARNED, LayerRoutingConfig
from headgate.methods.layer_routing.route import Route, entries, soft_weight
from headgate.methods.layer_routing.shares import Shares
from headgate.methods.step import Step
from headgate.ops.depth import depth_penalty, dual_ascent, lagrangian, target_penalty, threshold_for
from headgate.ops.routing_losses import flat_mean, reinforce_loss

RATE = 0.05
"""Of the running threshold, baseline and utilization."""
UNMET = 0.05
"""Distance of utilization from the target from which a finished run says that its budget was not reached."""


class Budget(nn.Module):
    """The price of depth of one router. Buffers: ``dual``, ``threshold``, ``baseline``, ``utilization``, ``updates``."""

    threshold: Tensor
    dual: Tensor
    baseline: Tensor
    utilization: Tensor
    updates: Tensor

    def __init__(self, config: LayerRoutingConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("threshold", "dual", "baseline", "utilization"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        # Sums over the window in progress; empty at every optimizer step, so no checkpoint needs them.
        self._window: Tensor | None = None

    def temperature(self, step: Step | None) -> float:
        """tau = max(floor, tau_0 decay^epoch), within an epoch too: a run of less than one also anneals."""
        c = self.config
        epoch = step.epoch if step is not None else 0.0
        return max(c.temperature_floor, c.temperature * c.temperature_decay**epoch)

    # -- losses -----------------------------------------------------------------------------------------
    def losses(self, route: Route, step: Step, shares: Shares) -> dict[str, Tensor]:
        """``routing_policy`` of REINFORCE, or ``routing_budget``; topk has its capacity and pays nothing, nor does an exact
        budget."""
        config = self.config
        if config.policy == "reinforce":
            assert route.log_prob is not None
            cost = self._cost(step, shares.used(route).detach(), shares)
            baseline = torch.where(self.updates == 0, cost, self.baseline)
            return {"routing_policy": reinforce_loss(route.log_prob, baseline - cost)}
        free = config.policy == "topk" or config.budget in ("exact", "none")
        if config.policy not in LEARNED or free or route.logits is None:  # a mask that is held has no price
            return {}
        return {"routing_budget": self._price(route, shares, self.temperature(step))}

    def _price(self, route: Route, shares: Shares, temperature: float) -> Tensor:
        """Differentiable through the gates."""
        config = self.config
        weight = soft_weight(route, config.policy, temperature)
        if config.budget == "penalty":
            mean = flat_mean(weight.expand(*route.context.valid.shape, -1), route.context.valid)
            return depth_penalty(mean, config.budget_weight)
        used = shares.used(route, weight)
        if config.budget == "target":
            return target_penalty(used, config.target_utilization, config.budget_weight)
        return lagrangian(used, config.target_utilization, self.dual, config.damping)

    def _cost(self, step: Step, used: Tensor, shares: Shares) -> Tensor:
        """What REINFORCE lowers: CE plus the price of depth. The reward is its negative."""
        config = self.config
        loss = step.task_loss if step.task_loss is not None else torch.zeros_like(used)
        if config.budget == "lagrangian":
            price = self.dual * used
        elif config.budget == "target":
            price = config.budget_weight * (used - config.target_utilization).square()
        elif config.budget == "penalty":
            price = config.budget_weight * (used - shares.always) * shares.num_blocks
        else:
            price = torch.zeros_like(used)
        return loss.detach() + price

    # -- running state ------------------------------------------------------------------------------------
    def observe(self, route: Route, step: Step, shares: Shares) -> None:
        """Add an accepted micro-batch to the window's sums."""
        config, used = self.config, shares.used(route)
        figures = [torch.ones_like(used), used, self.threshold.to(used), torch.zeros_like(used)]
        target = config.calibration_target
        if target is not None and route.free is not None and route.logits is not None:
            logit, worth, counted, always = entries(route, config, shares.per_gate)
            wanted = (target - shares.always) * route.context.valid.sum() - always
            found = threshold_for(logit, worth, wanted, counted)
            figures[2] = torch.where(found.isnan(), self.threshold, found)
        if config.policy == "reinforce":
            figures[3] = self._cost(step, used, shares)
        summed = torch.stack([figure.float().reshape(()) for figure in figures])
        self._window = summed if self._window is None else self._window + summed

    def update(self, step: Step) -> Tensor | None:
        """Move by the window's mean, the same on every rank; returns its utilization, None where all was rejected."""
        summed, self._window = self._window, None
        if summed is None:  # every rank took the same decisions, so none waits for a sum
            return None
        count, *sums = step.sum_across_ranks(summed).unbind()
        used, threshold, cost = (total / count for total in sums)
        config = self.config
        if config.budget == "lagrangian":
            self.dual.copy_(dual_ascent(self.dual, used, config.target_utilization, config.dual_step))
        self._follow(self.utilization, used)
        if (
            config.calibration_target is not None
            and config.policy in LEARNED
            and config.policy != "reinforce"
        ):
            self._follow(self.threshold, threshold)
        if config.policy == "reinforce":
            self._follow(self.baseline, cost)
        self.updates += 1
        return used

    def set_threshold(self, threshold: Tensor) -> None:
        """Of inference, as calibrated; the running mean over training goes on from there."""
        self.threshold.copy_(threshold)

    def _follow(self, average: Tensor, value: Tensor) -> None:
        average.copy_(torch.where(self.updates == 0, value, average.lerp(value, RATE)))

    def telemetry(self, step: Step) -> dict[str, Tensor]:
        """The log line's part of it, after an update."""
        config, line = self.config, {}
        if config.policy in LEARNED:
            line["routing/temperature"] = torch.tensor(self.temperature(step))
            line["routing/threshold"] = self.threshold.clone()
            if config.budget == "lagrangian":
                line["routing/dual"] = self.dual.clone()
        return line

    # -- what a run says of it ----------------------------------------------------------------------------
    def figures(self) -> dict[str, float]:
        """Running means of training; {} before the first step."""
        if not self.updates:
            return {}
        return {"routing_utilization": float(self.utilization), "routing_threshold": float(self.threshold)}

    def warn_if_unmet(self) -> None:
        """Gates that never came to the target are set by the threshold alone: the router did not learn which."""
        config, used = self.config, float(self.utilization)
        held = config.budget == "lagrangian" and config.policy in LEARNED and bool(self.updates)
        if not held or abs(used - config.target_utilization) <= UNMET:
            return
        above = used > config.target_utilization
        warnings.warn(
            f"layer_routing: at the end of training the gates asked for {used:.0%} of the blocks, not for "
            f"target_utilization={config.target_utilization:g}: the price of depth (dual variable {float(self.dual):.2f}) "
            + ("has not reached its level, " if above else "is above its level, ")
            + f"so the threshold {'closes' if above else 'opens'} what the router wants {'open' if above else 'closed'}. "
            + ("Train longer, or raise" if above else "Train longer, raise init_keep, or lower")
            + f" dual_step ({config.dual_step:g}).",
            stacklevel=2,
        )
