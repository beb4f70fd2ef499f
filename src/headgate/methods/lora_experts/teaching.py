"""What the router and the experts are taught besides the task: balance, sharpness, distance, agreement."""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.lora_experts.forward import Pass, RoutedForward
from headgate.methods.step import Step
from headgate.methods.teacher import distilled
from headgate.models.anatomy import Batch, model_inputs
from headgate.models.sharding import is_sharded
from headgate.models.surgery import head_bypassed
from headgate.ops.routing_losses import load_balance, router_z_loss, routing_entropy

SKILL = "skill"
"""Column with the name of the skill that a row belongs to."""


def auxiliary_losses(routed: RoutedForward, done: Pass, step: Step, skill: str | None) -> dict[str, Tensor]:
    """Every term that these settings ask for, weighted; per-site routers share a term equally.

    ``skill``: the one in training, whose rows distillation on replayed ones leaves out.
    """
    config, parts = routed.config, {}
    shape, valid = done.context.valid.shape, done.context.valid
    if config.router == "learned":
        terms: dict[str, list[Tensor]] = {}
        for mixture in routed.mixtures_of(done):
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
        parts = {name: torch.stack(values).mean() for name, values in terms.items()}
    if config.orthogonality and (penalty := orthogonality(routed.experts)) is not None:
        parts["expert_orthogonality"] = config.orthogonality * penalty
    if config.kd_weight and (pull := backward_distillation(routed, step, skill)) is not None:
        parts["expert_kd"] = config.kd_weight * pull
    return parts


def orthogonality(experts: ExpertSet) -> Tensor | None:
    """sum |A_i A_t^T| over sites and frozen experts i, t the one that trains (O-LoRA, Wang et al. 2023, eq. 7).

    Equation: lora_experts (orthogonality): sum_i |A_i A_t^T| over frozen experts i
    Proved by: tests/lora_experts/test_training.py::test_orthogonality_and_balance_are_their_formulas
    """
    name = experts.roster.info(experts.current).name
    total: Tensor | None = None
    for site in experts.banks:
        bank = experts.bank(site)
        others = [i.name for i in experts.roster if i.name != name and bank.expert(i.name).frozen]
        if others and not bank.expert(name).frozen:
            frozen = torch.cat([bank.expert(other).down for other in others])
            term = (frozen @ bank.expert(name).down.T).abs().sum()
            total = term if total is None else total + term
    return total


def backward_distillation(routed: RoutedForward, step: Step, skill: str | None) -> Tensor | None:
    """T^2 KL(p_ensemble of the mature experts || p with the young one), over the labelled tokens of some rows.

    Those that ``kd_on`` names; None where there are none, or while no other expert is mature.
    """
    experts, anatomy = routed.experts, routed.anatomy
    teachers = set(experts.mature()) - {experts.current}
    left_out = tuple(info.number for info in experts.roster if info.number not in teachers)
    rows = distilled_rows(routed.config.kd_on, step.batch, skill)
    if not teachers or step.hidden is None:
        return None
    mine = len(rows) > 0
    if not (_anywhere(step, mine) if is_sharded(anatomy.model) else mine):
        return None
    if (
        not mine
    ):  # the ranks of a sharded base run every forward together: this one lends its share of the weights
        rows = torch.zeros(1, dtype=torch.long, device=step.labels.device)
    inputs = {name: value[rows] for name, value in model_inputs(step.batch, labels=False).items()}
    with routed.aside(left_out), head_bypassed(anatomy.head) as captured:
        anatomy.model(**inputs, use_cache=False)
    temperature = routed.config.kd_temperature
    pull = distilled(anatomy, step.hidden[rows], captured[-1], step.labels[rows], temperature)
    return pull if mine else None


def _anywhere(step: Step, here: bool) -> bool:
    """Whether so on any rank. Collective."""
    return float(step.sum_across_ranks(torch.tensor(float(here)))) > 0


def distilled_rows(kd_on: str, batch: Batch, skill: str | None) -> Tensor:
    """``[R]``: the rows that distillation looks at. All documents of a packed row are of one skill."""
    device = batch["labels"].device
    if kd_on == "batch":
        return torch.arange(len(batch["labels"]), device=device)
    names = [name[0] if isinstance(name, list) else name for name in batch[SKILL]]
    return torch.tensor([i for i, name in enumerate(names) if name != skill], device=device).long()
