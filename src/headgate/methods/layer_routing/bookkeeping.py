"""What steps and validations leave behind: dual variable, threshold, baseline, figures of the log and the result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headgate.methods.layer_routing.policies import Route, entries
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.ops.depth import adaptivity, binary_entropy, dual_ascent, threshold_for
from headgate.ops.routing_losses import flat_mean

if TYPE_CHECKING:
    from headgate.methods.layer_routing.method import LayerRouting

RATE = 0.05
"""Of the running threshold, baseline and utilization."""
UNMET = 0.05
"""Utilization above the target from which a finished run says that its budget was not reached."""


def worth(anatomy: Anatomy, blocks: Sequence[int], units: int) -> tuple[Tensor, float, float]:
    """What each gate is worth of the whole depth, what always runs, and keys and values' share of a block.

    In matrix-product FLOPs of a token; attention and MLP share a block's worth by theirs.
    """
    h, kv = anatomy.hidden_size, anatomy.num_kv_heads * anatomy.head_dim
    attention = 2 * h * (anatomy.num_heads * anatomy.head_dim + kv)
    mlp = anatomy.mlp(anatomy.blocks[0])
    gated = hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj")
    block = attention + (3 if gated else 2) * h * anatomy.intermediate_size
    per_unit = [1.0] if units == 1 else [attention / block, 1 - attention / block]
    share = torch.tensor(per_unit * len(blocks)) / anatomy.num_blocks
    return share, 1 - len(blocks) / anatomy.num_blocks, 2 * h * kv / block


def cost(method: LayerRouting, step: Step, used: Tensor) -> Tensor:
    """What REINFORCE lowers: CE plus the price of depth. The reward is its negative."""
    config = method.config
    loss = step.task_loss if step.task_loss is not None else torch.zeros_like(used)
    if config.budget == "lagrangian":
        price = method.dual * used
    elif config.budget == "target":
        price = config.budget_weight * (used - config.target_utilization).square()
    else:
        price = config.budget_weight * used if config.budget == "penalty" else torch.zeros_like(used)
    return loss.detach() + price


def follow(method: LayerRouting, route: Route, step: Step) -> Tensor:
    """Move the method's running state by this batch, averaged over ranks; returns the utilization."""
    config = method.config
    used = method.used(route)
    figures = [used, torch.ones_like(used)]
    has_threshold = route.free is not None and route.logits is not None
    if has_threshold:
        logit, value, always = entries(route, config.policy, method.units, method.share)
        wanted = (config.target_utilization - method.always) * route.context.valid.sum() - always
        figures.append(threshold_for(logit, value, wanted) if len(logit) else method.threshold)
    if config.policy == "reinforce":
        figures.append(cost(method, step, used))
    summed = step.sum_across_ranks(torch.stack([figure.float().reshape(()) for figure in figures]))
    mean = summed / summed[1]
    if config.budget == "lagrangian":
        method.dual.copy_(dual_ascent(method.dual, mean[0], config.target_utilization, config.dual_step))
    moved = {"held": mean[0]}
    if has_threshold:
        moved["threshold"] = mean[2]
    if config.policy == "reinforce":
        moved["baseline"] = mean[2]
    for name, value in moved.items():
        average = getattr(method, name)
        average.copy_(torch.where(method.warm == 0, value, average.lerp(value, RATE)))
    method.warm += 1
    return mean[0]


def telemetry(method: LayerRouting, route: Route, step: Step, used: Tensor) -> dict[str, Tensor]:
    """The log line: what was asked for, what ran, and whether the gates depend on the token."""
    opened, valid = (route.weight != 0).float(), route.context.valid
    rates = flat_mean(opened.expand(*valid.shape, -1), valid)
    found = {
        "routing/utilization": used,
        "routing/executed": torch.as_tensor(method.executed_share(step)) + method.first_forward,
        "routing/blocks": rates,
        "routing/dead": (rates == 0).sum().float(),
        "routing/always_on": (rates == 1).sum().float(),
        "routing/adaptivity": adaptivity(opened, valid).mean(),
    }
    if route.logits is not None:
        found["routing/entropy"] = binary_entropy(torch.sigmoid(route.logits)).mean() / math.log(2)
        found["routing/temperature"] = torch.tensor(method.temperature(step))
        found["routing/threshold"] = method.threshold.clone()
    if method.config.budget == "lagrangian" and method.router is not None:
        found["routing/dual"] = method.dual.clone()
    return found


def warn_of_unmet_budget(method: LayerRouting) -> None:
    """Gates that never came down to the target are closed by the threshold alone: the router did not learn which."""
    config, held = method.config, float(method.held)
    if (
        config.budget == "lagrangian"
        and method.router is not None
        and held > config.target_utilization + UNMET
    ):
        warnings.warn(
            f"layer_routing: at the end of training the gates asked for {held:.0%} of the blocks, not for "
            f"target_utilization={config.target_utilization:g}: the price of depth (dual variable {float(method.dual):.2f}) "
            f"has not reached its level, so the threshold closes what the router wants open. Train longer, or raise dual_step "
            f"({config.dual_step:g}).",
            stacklevel=2,
        )


class Tally:
    """Open gates on the real tokens of one validation, counted on the device: one sum a batch."""

    def __init__(self, tokens: int = 0, opened: Sequence[int] | None = None) -> None:
        self.tokens: Tensor | int = tokens
        self.opened: Tensor | int = 0 if opened is None else torch.tensor(opened)

    def counts(self) -> tuple[int, list[int] | None]:
        """Real tokens, and of each gate how many of them it was open for; JSON."""
        return int(self.tokens), self.opened.tolist() if isinstance(self.opened, Tensor) else None

    def add(self, route: Route) -> None:
        valid = route.context.valid
        opened = (route.weight != 0) & valid.unsqueeze(-1)
        self.tokens = self.tokens + valid.sum()
        self.opened = self.opened + opened.sum((0, 1))


def held_out(method: LayerRouting, tallies: Iterable[Tally]) -> dict[str, Any]:
    """Utilization, adaptivity (nats, mean over gates) and executed share on validation data; {} where none ran.

    Gates at inference are 0 or 1, so I(gate; token) = H(E p) - E H(p) is the entropy of the open rate.
    """
    counted = [tally for tally in tallies if int(tally.tokens)]
    if not counted:
        return {}
    tokens = torch.stack([torch.as_tensor(tally.tokens) for tally in counted]).sum()
    rate = torch.stack([torch.as_tensor(tally.opened) for tally in counted]).sum(0) / tokens
    used = method.always + (rate * method.share.to(rate)).sum()
    executed = torch.as_tensor(method.executed_of(used, method.engine)) + method.first_forward
    return {
        "routing_utilization_eval": float(used),
        "routing_adaptivity_eval": float(binary_entropy(rate).mean()),
        "routing_executed_eval": float(executed),
    }
