"""Who takes part, and with what weight: features -> Mixture, the same in training and at evaluation.

    tau = tau_min + (tau_0 - tau_min) 2^(-dt / h)                 dt: age of the youngest expert
    g_i proportional to m_i exp(z_i / tau)                        m_i: maturity; 0 takes no part at all
    the top k of the mature ones and every young one; then the top 1 of all with its probability among them
    beside them, with a Bayes router, the base's own writing: its gate is nobody's, and goes to the base

An expert of maturity 0 is left out of every product rather than multiplied by zero: the function at its birth is
then the old one bit for bit. Its first training step counts as age 1, or it could never receive a gradient; the
temperature and the dense phase that a birth brings begin with that step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.roster import Roster
from headgate.modules.bayes_router import BASE
from headgate.modules.closed_form_router import ClosedFormRouter
from headgate.modules.expert_bank import Mixture
from headgate.modules.expert_router import ExpertRouter
from headgate.ops.gating import Gates, capacity_mask, maturity_gates


@dataclass(frozen=True)
class Phase:
    """Where routing stands: experts taking part, their maturity, the temperature, gates kept of the mature (None: all)."""

    numbers: tuple[int, ...]
    maturity: tuple[float, ...]
    temperature: float
    k: int | None

    @property
    def young(self) -> list[int]:
        """Places of the experts that are not mature yet."""
        return [place for place, m in enumerate(self.maturity) if m < 1]


def phase_of(config: LoraExpertsConfig, roster: Roster, training: bool, without: Sequence[int] = ()) -> Phase:
    """The phase of a forward; ``training``: one step older than what was accepted. ``without``: left out.

    Equation: lora_experts (temperature): tau = tau_min + (tau_0 - tau_min) 2^(-dt / h)
    Proved by: tests/lora_experts/test_laws.py::test_phases_follow_the_youngest
    """
    ages, maturity = roster.age.tolist(), roster.maturity(config.maturity_steps, ahead=int(training))
    there = [
        (info, age + training, m)
        for info, age, m in zip(roster.infos, ages, maturity, strict=True)
        if m > 0 and info.number not in without
    ]
    since_birth = min(age for _, age, _ in there)
    decay = 2 ** (-since_birth / config.temperature_half_life)
    temperature = config.temperature_min + (config.temperature_start - config.temperature_min) * decay
    counted = tuple(1.0 if config.router == "sum" else m for _, _, m in there)
    k: int | None = None if config.dense_phase else config.top_k
    if min(counted) >= 1:
        ripe = min(age - (0 if info.founder else config.maturity_steps) for info, age, _ in there)
        k = 1 if config.top_1_after is not None and ripe >= config.top_1_after else config.top_k
    return Phase(tuple(info.number for info, _, _ in there), counted, temperature, k)


def fixed_mixture(roster: Roster, weights: Mapping[int, float], device: torch.device) -> Mixture:
    """The same gates for every token; of one expert with gate 1, that expert alone."""
    weight = torch.tensor(list(weights.values()), device=device).view(1, 1, -1)
    return mixture_of(roster, tuple(weights), Gates(weight, weight), weight)


def mix(
    config: LoraExpertsConfig,
    roster: Roster,
    phase: Phase,
    router: ExpertRouter | ClosedFormRouter | None,
    features: Tensor,
    valid: Tensor,
    *,
    capacity: bool,
) -> Mixture:
    """The mixture of one forward; ``capacity``: whether the limit of training applies."""
    maturity = torch.tensor(phase.maturity).to(features.device, non_blocking=True)
    if router is None:  # uniform, sum
        level = torch.ones_like(maturity) if config.router == "sum" else maturity / maturity.sum()
        weight = level.view(1, 1, -1)
        return mixture_of(roster, phase.numbers, Gates(weight, torch.zeros_like(weight)), weight)
    names, scales = roster.named(phase.numbers)
    with_base = isinstance(router, ClosedFormRouter) and BASE in router.owners
    if with_base:
        maturity = torch.cat([maturity, maturity.new_ones(1)])
    logits = router(features, (*names, BASE) if with_base else names)
    always = [*phase.young, len(names)] if with_base else phase.young
    gates = maturity_gates(logits, maturity, phase.temperature, phase.k, always)
    probs = gates.weight
    if gates.chosen is not None:
        probs = torch.softmax(logits / phase.temperature + maturity.log(), dim=-1)
    if with_base:  # the base's gate multiplies nothing
        gates, probs = _without_last(gates), probs[..., :-1]
    dropped = None
    sparse = phase.k is not None and (gates.chosen is not None or not phase.young)
    if capacity and config.capacity_factor is not None and sparse:
        assert phase.k is not None
        limit = math.ceil(config.capacity_factor * phase.k * int(valid.sum()) / len(phase.numbers))
        gates, dropped = capacity_mask(gates, valid, limit)
    return _scaled(names, scales, gates, probs, dropped)


def _without_last(gates: Gates) -> Gates:
    """Of the experts, where the last gate was the base's, which stands last among the chosen too."""
    chosen = None if gates.chosen is None else gates.chosen[..., :-1]
    return Gates(gates.weight[..., :-1], gates.logits[..., :-1], chosen)


def mixture_of(roster: Roster, numbers: Sequence[int], gates: Gates, probs: Tensor) -> Mixture:
    """Gates over these experts, with every expert's alpha / r."""
    return _scaled(*roster.named(numbers), gates, probs, None)


def _scaled(
    names: tuple[str, ...], scales: list[float], gates: Gates, probs: Tensor, dropped: Tensor | None
) -> Mixture:
    scaled = gates.weight * torch.tensor(scales).to(gates.weight.device, non_blocking=True)
    # here, outside the blocks: a tensor that a recomputed block made could not be shared by the others
    paid = None if gates.chosen is None else scaled.gather(-1, gates.chosen)
    return Mixture(names, gates, probs, scaled, paid, dropped)
