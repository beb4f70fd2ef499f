"""Figures of a log line and of a run's result: who is used, how sure the router is, how far each expert has come."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.lora_experts.forward import Pass
from headgate.modules.expert_bank import Mixture
from headgate.ops.routing_losses import expert_load, routing_entropy


def loads(mixtures: list[Mixture], valid: Tensor) -> tuple[Tensor, Tensor]:
    """Soft and dispatched share ``[N]`` of each expert taking part, averaged over routers."""
    soft, dispatched = [], []
    for mixture in mixtures:
        weight = mixture.gates.weight.expand(*valid.shape, -1)
        soft.append(expert_load(mixture.probs.expand(*valid.shape, -1), valid))
        dispatched.append(expert_load(weight > 0, valid))
    return torch.stack(soft).mean(0), torch.stack(dispatched).mean(0)


def telemetry(
    experts: ExpertSet, done: Pass, mixtures: list[Mixture], soft: Tensor, dispatched: Tensor
) -> dict[str, Tensor]:
    """The log line of a pass with these mixtures and loads."""
    valid, roster = done.context.valid, experts.roster
    entropies = [routing_entropy(m.probs.expand(*valid.shape, -1), valid) for m in mixtures]
    figures = {
        "routing_entropy": torch.stack([h.mean_of for h in entropies]).mean(),
        "experts/entropy_normalised": torch.stack([h.mean_of_normalised for h in entropies]).mean(),
        "experts/count": torch.tensor(float(len(roster))),
    }
    if done.phase is not None:
        figures["experts/temperature"] = torch.tensor(done.phase.temperature)
        figures["experts/top_k"] = torch.tensor(float(done.phase.k or len(done.phase.numbers)))
    if mixtures[0].dropped is not None:
        figures["experts/drop_share"] = torch.stack([torch.as_tensor(m.dropped) for m in mixtures]).mean()
    for name, share, sent in zip(mixtures[0].experts, soft, dispatched, strict=True):
        figures[f"expert_usage_{name}"], figures[f"expert_usage_{name}_dispatched"] = share, sent
    maturity = roster.maturity(experts.config.maturity_steps)
    for info, m in zip(roster, maturity, strict=True):
        figures[f"experts/maturity_{info.name}"] = torch.tensor(m)
        gradients = [p.grad for p in experts.live_factors(info.number) if p.grad is not None]
        if gradients:
            norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
            figures[f"grad_norm/expert_{info.name}"] = torch.linalg.vector_norm(norms)
    return figures


class ExpertRow(TypedDict):
    """One expert, for results and ``inspect``. ``usage``, ``served_tokens``, ``loss``: None where nothing was measured."""

    expert: int
    rank: int
    alpha: float
    skills: list[str]
    born: int
    reason: str
    age: int
    maturity: float
    usage: float | None
    served_tokens: float | None
    loss: float | None
    frozen: bool


def info_table(experts: ExpertSet) -> list[ExpertRow]:
    """One row per expert, for results and ``inspect``."""
    roster = experts.roster
    maturity = roster.maturity(experts.config.maturity_steps)

    def figure(tensor: Tensor, place: int) -> float | None:
        value = float(tensor[place])
        return value if value == value else None

    return [
        {
            "expert": info.number,
            "rank": info.rank,
            "alpha": info.alpha,
            "skills": list(info.skills),
            "born": info.born,
            "reason": info.reason,
            "age": int(roster.age[place]),
            "maturity": m,
            "usage": figure(roster.usage, place),
            "served_tokens": figure(roster.served, place),
            "loss": figure(roster.loss, place),
            "frozen": len(info.frozen) > 0,
        }
        for place, (info, m) in enumerate(zip(roster, maturity, strict=True))
    ]
