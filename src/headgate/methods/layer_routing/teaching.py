"""What the router and the adapter are taught besides the task: a budget, a teacher, a policy gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.methods.layer_routing.bookkeeping import cost
from headgate.methods.layer_routing.policies import Route, soft_weight
from headgate.methods.step import IGNORE_INDEX, Step
from headgate.models.block_parts import adapters_off
from headgate.models.surgery import head_bypassed
from headgate.ops.depth import binary_entropy, depth_penalty, lagrangian, target_penalty
from headgate.ops.distillation import distillation_loss
from headgate.ops.head_loss import shifted_rows
from headgate.ops.routing_losses import flat_mean, reinforce_loss

if TYPE_CHECKING:
    from headgate.methods.layer_routing.method import LayerRouting


def auxiliary_losses(method: LayerRouting, route: Route, step: Step, *, distil: bool) -> dict[str, Tensor]:
    """Every term that this policy and these settings ask for, weighted."""
    config, found = method.config, {}
    if config.policy == "reinforce":
        assert route.log_prob is not None
        paid = cost(method, step, method.used(route).detach())
        baseline = torch.where(method.warm == 0, paid, method.baseline)
        found["routing_policy"] = reinforce_loss(route.log_prob, baseline - paid)
    elif method.router is not None:
        budget = budget_loss(method, route, step)
        if budget is not None:
            found["routing_budget"] = budget
    if config.policy == "topk" and route.member is not None and route.logits is not None:
        real = route.context.valid
        found["routing_member"] = F.binary_cross_entropy_with_logits(
            route.logits[real], route.member[real].to(route.logits)
        )
    if config.entropy_bonus and route.logits is not None:
        spread = binary_entropy(torch.sigmoid(route.logits).clamp(1e-6, 1 - 1e-6)).mean()
        found["routing_entropy"] = -config.entropy_bonus * spread
    if distil:
        found["routing_kd"] = config.kd_weight * teacher_loss(method, step)
    return found


def budget_loss(method: LayerRouting, route: Route, step: Step) -> Tensor | None:
    """The price of depth, differentiable through the gates; topk has its capacity and needs none."""
    config = method.config
    if config.budget == "none" or config.policy == "topk":
        return None
    weight = soft_weight(route, method.units, config.policy, method.temperature(step))
    if config.budget == "penalty":
        mean = flat_mean(weight.expand(*route.context.valid.shape, -1), route.context.valid)
        return depth_penalty(mean, config.budget_weight)
    used = method.used(route, weight)
    if config.budget == "target":
        return target_penalty(used, config.target_utilization, config.budget_weight)
    return lagrangian(used, config.target_utilization, method.dual, config.damping)


def teacher_loss(method: LayerRouting, step: Step) -> Tensor:
    """KL from the same model with adapter and routing off, over labelled tokens."""
    anatomy = method._anatomy
    assert anatomy is not None and step.hidden is not None
    model, route = anatomy.model, method.route
    inputs = {
        k: v
        for k, v in step.batch.items()
        if k in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
    }
    was_training = [module for module in model.modules() if module.training]
    method.suspended = True
    try:
        model.eval()
        with torch.no_grad(), adapters_off(model), head_bypassed(anatomy.head) as captured:
            model(**inputs, use_cache=False)
    finally:
        method.suspended = False
        for module in was_training:
            module.training = True
        method.route = route
    head: Any = anatomy.head
    student, _, _ = shifted_rows(step.hidden, step.labels, IGNORE_INDEX)
    teacher, _, _ = shifted_rows(captured[-1], step.labels, IGNORE_INDEX)
    return distillation_loss(
        student,
        teacher,
        head.weight,
        getattr(head, "bias", None),
        temperature=method.config.kd_temperature,
        softcap=anatomy.softcap,
    )
