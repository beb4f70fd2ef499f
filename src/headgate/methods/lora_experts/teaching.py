"""What the router and the experts are taught besides the task: balance, sharpness, distance, agreement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headgate.methods.lora_experts.forward import Pass
from headgate.methods.step import Step
from headgate.methods.teacher import distilled
from headgate.models.surgery import head_bypassed
from headgate.ops.routing_losses import load_balance, router_z_loss, routing_entropy

if TYPE_CHECKING:
    from headgate.methods.lora_experts.method import LoraExperts

SKILL = "skill"
"""Column with the name of the skill that a row belongs to."""


def auxiliary_losses(method: LoraExperts, done: Pass, step: Step) -> dict[str, Tensor]:
    """Every term that these settings ask for, weighted; per-site routers share a term equally."""
    config, found = method.config, {}
    shape, valid = done.context.valid.shape, done.context.valid
    if config.router == "learned":
        terms: dict[str, list[Tensor]] = {}
        for mixture in method.mixtures_of(done):
            logits, probs = mixture.gates.logits, mixture.probs
            if config.z_loss:
                terms.setdefault("expert_z", []).append(config.z_loss * router_z_loss(logits, valid))
            if len(mixture.experts) > 1:
                if config.balance:
                    weight = mixture.gates.weight.expand(*shape, -1)
                    term = config.balance * load_balance(probs, weight, valid)
                    terms.setdefault("expert_balance", []).append(term)
                if config.entropy_token or config.entropy_mean:
                    h = routing_entropy(probs, valid)
                    term = config.entropy_token * h.mean_of - config.entropy_mean * h.of_mean
                    terms.setdefault("expert_entropy", []).append(term)
        found = {name: torch.stack(parts).mean() for name, parts in terms.items()}
    if config.orthogonality and (penalty := orthogonality(method)) is not None:
        found["expert_orthogonality"] = config.orthogonality * penalty
    if config.kd_weight and (pull := backward_distillation(method, step)) is not None:
        found["expert_kd"] = config.kd_weight * pull
    return found


def orthogonality(method: LoraExperts) -> Tensor | None:
    """sum |A_i A_t^T| over sites and frozen experts i, t the one that trains (O-LoRA, Wang et al. 2023, eq. 7)."""
    name = method.roster.info(method.current).name
    total: Tensor | None = None
    for site in method.banks:
        bank = method.bank(site)
        others = [i.name for i in method.roster if i.name != name and bank.expert(i.name).frozen]
        if others and not bank.expert(name).frozen:
            frozen = torch.cat([bank.expert(other).down for other in others])
            term = (frozen @ bank.expert(name).down.T).abs().sum()
            total = term if total is None else total + term
    return total


def backward_distillation(method: LoraExperts, step: Step) -> Tensor | None:
    """T^2 KL(p_ensemble of the mature experts || p with the young one), over the labelled tokens of some rows.

    Those that ``kd_on`` names; None where there are none, or while no other expert is mature.
    """
    young, roster = method.current, method.roster
    maturity = roster.maturity(roster.age.tolist(), method.config.maturity_steps)
    left_out = tuple(i.number for i, m in zip(roster, maturity, strict=True) if m < 1 or i.number == young)
    anatomy = method._anatomy
    rows = distilled_rows(method, step.batch)
    if len(left_out) == len(roster) or anatomy is None or step.hidden is None or not len(rows):
        return None
    inputs = {
        k: v[rows]
        for k, v in step.batch.items()
        if k in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
    }
    with torch.no_grad(), method.aside(left_out), head_bypassed(anatomy.head) as captured:
        anatomy.model(**inputs, use_cache=False)
    return distilled(
        anatomy, step.hidden[rows], captured[-1], step.labels[rows], method.config.kd_temperature
    )


def distilled_rows(method: LoraExperts, batch: Mapping[str, Any]) -> Tensor:
    """``[R]``: the rows that distillation looks at. All documents of a packed row are of one skill."""
    device = batch["labels"].device
    if method.config.kd_on == "batch":
        return torch.arange(len(batch["labels"]), device=device)
    skills = [skill[0] if isinstance(skill, list) else skill for skill in batch[SKILL]]
    return torch.tensor([i for i, skill in enumerate(skills) if skill != method.skill], device=device).long()
