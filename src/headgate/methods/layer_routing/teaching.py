"""What the router and the adapter are taught besides the task: a budget, a teacher, a policy gradient."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.layer_routing.bookkeeping import cost
from headgate.methods.layer_routing.policies import Route, soft_weight
from headgate.methods.step import Step
from headgate.methods.teacher import distilled
from headgate.models.block_parts import adapters_off, evaluating
from headgate.models.frozen_adapter import FrozenAdapter
from headgate.models.surgery import head_bypassed
from headgate.ops.depth import binary_entropy, depth_penalty, lagrangian, target_penalty
from headgate.ops.routing_losses import flat_mean, reinforce_loss

if TYPE_CHECKING:
    from headgate.methods.layer_routing.method import LayerRouting

ADAPTER_ALONE = ("layer_routing", "backward_gate", "ewc")
"""Methods after which a run's model is its base and its adapter; at full depth, where it was routed."""


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
    """KL from the teacher, at full depth and in evaluation mode, over labelled tokens."""
    anatomy = method._anatomy
    assert anatomy is not None and step.hidden is not None
    model = anatomy.model
    inputs = {
        k: v
        for k, v in step.batch.items()
        if k in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
    }
    added = method.teacher.applied(model) if method.teacher is not None else nullcontext()
    method.suspended = True
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            adapters_off(model),
            added,
            head_bypassed(anatomy.head) as captured,
        ):
            model(**inputs, use_cache=False)
    finally:
        method.suspended = False
    return distilled(anatomy, step.hidden, captured[-1], step.labels, method.config.kd_temperature)


def read_teacher(teacher: str) -> FrozenAdapter:
    """The adapter of ``run:<path>``, a run directory or the folder of a saved model.

    Raises ConfigError where there is none, or where that run's function is more than its base and adapter.
    """
    given = Path(teacher.removeprefix("run:"))
    folder = next((f for f in (given, given / "checkpoint") if (f / "adapter_config.json").exists()), None)
    where = f"layer_routing.teacher={teacher}"
    if folder is None:
        why = (
            "the folder does not exist"
            if not given.exists()
            else (
                "there is no adapter_config.json in it or in its checkpoint/ (a run that is not complete, or one without lora)"
            )
        )
        raise ConfigError(f"{where}: {why}: give a complete run that trained with `lora`, or teacher: base")
    description = folder / "headgate.json"
    methods = json.loads(description.read_text())["methods"] if description.exists() else {}
    beyond = sorted(set(methods) - set(ADAPTER_ALONE))
    if beyond:
        raise ConfigError(
            f"{where}: that run's function is more than its LoRA adapter ({', '.join(beyond)}), and only the adapter can "
            "teach: give a run of `lora` alone, or teacher: base"
        )
    return FrozenAdapter.read(folder)
