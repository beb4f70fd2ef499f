"""What a step leaves behind: ages, usage, losses; and the figures of its log line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headgate.methods.lora_experts.forward import Pass
from headgate.methods.lora_experts.roster import Roster
from headgate.methods.step import Step
from headgate.modules.expert_bank import Mixture
from headgate.ops.routing_losses import expert_load, routing_entropy

if TYPE_CHECKING:
    from headgate.methods.lora_experts.config import LoraExpertsConfig
    from headgate.methods.lora_experts.method import LoraExperts

RATE = 0.05
"""Of the moving usage and loss."""


def loads(mixtures: list[Mixture], valid: Tensor) -> tuple[Tensor, Tensor]:
    """Soft and dispatched share ``[N]`` of each expert taking part, averaged over routers."""
    soft, dispatched = [], []
    for mixture in mixtures:
        weight = mixture.gates.weight.expand(*valid.shape, -1)
        soft.append(expert_load(mixture.probs.expand(*valid.shape, -1), valid))
        dispatched.append(expert_load(weight > 0, valid))
    return torch.stack(soft).mean(0), torch.stack(dispatched).mean(0)


def follow(
    method: LoraExperts, step: Step, dispatched: Tensor, names: tuple[str, ...], tokens: Tensor
) -> None:
    """Usage, tokens served and loss of an accepted micro-batch of so many real tokens, averaged over ranks."""
    roster = method.roster
    loss = step.task_loss if step.task_loss is not None else dispatched.new_full((), float("nan"))
    rest = torch.stack([loss.float(), tokens.float(), torch.ones_like(tokens, dtype=torch.float)])
    total = step.sum_across_ranks(torch.cat([dispatched.float(), rest]))
    mean, tokens = total / total[-1], total[-2]
    now = torch.zeros_like(roster.usage)
    now[[roster.place(int(name)) for name in names]] = mean[:-3]
    roster.usage.lerp_(now, RATE)
    roster.served += now * tokens
    place = roster.place(method.current)
    old = roster.loss[place]
    roster.loss[place] = torch.where(old.isnan(), mean[-3], old.lerp(mean[-3], RATE))


def grow_older(method: LoraExperts) -> None:
    """One accepted optimizer step; an expert that matures by it keeps the loss it matured at."""
    roster, ramp = method.roster, method.config.maturity_steps
    roster.age += 1
    roster.loss_at_maturity.copy_(torch.where(roster.age == ramp, roster.loss, roster.loss_at_maturity))


def telemetry(
    method: LoraExperts, done: Pass, mixtures: list[Mixture], soft: Tensor, dispatched: Tensor
) -> dict[str, Tensor]:
    """The log line: who is used, how sure the router is, how far each expert has come."""
    valid, roster = done.context.valid, method.roster
    entropies = [routing_entropy(m.probs.expand(*valid.shape, -1), valid) for m in mixtures]
    found = {
        "routing_entropy": torch.stack([h.mean_of for h in entropies]).mean(),
        "experts/entropy_normalised": torch.stack([h.mean_of_normalised for h in entropies]).mean(),
        "experts/count": torch.tensor(float(len(roster))),
    }
    if done.phase is not None:
        found["experts/temperature"] = torch.tensor(done.phase.temperature)
        found["experts/top_k"] = torch.tensor(float(done.phase.k or len(done.phase.numbers)))
    if mixtures[0].dropped is not None:
        found["experts/drop_share"] = torch.stack([torch.as_tensor(m.dropped) for m in mixtures]).mean()
    for name, share, sent in zip(mixtures[0].experts, soft, dispatched, strict=True):
        found[f"expert_usage_{name}"], found[f"expert_usage_{name}_dispatched"] = share, sent
    maturity = roster.maturity(roster.age.tolist(), method.config.maturity_steps)
    for info, m in zip(roster, maturity, strict=True):
        found[f"experts/maturity_{info.name}"] = torch.tensor(m)
        gradients = [p.grad for p in method.expert_parameters(info.number) if p.grad is not None]
        if gradients:
            norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
            found[f"grad_norm/expert_{info.name}"] = torch.linalg.vector_norm(norms)
    return found


def info_table(roster: Roster, config: LoraExpertsConfig) -> list[dict[str, Any]]:
    """One row per expert, for results and ``inspect``."""
    maturity = roster.maturity(roster.age.tolist(), config.maturity_steps)

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
