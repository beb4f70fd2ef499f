"""Laws of the gates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgate.ops import gating as G


def logits(seed: int, experts: int, tokens: int = 5, scale: float = 1.0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, experts, generator=stream, dtype=torch.float64) * scale


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.data())
def test_top_k_keeps_the_largest_and_sums_to_one(seed: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    z = logits(seed, experts)
    p = torch.softmax(z, -1)
    raw, renormalised = G.top_k_gates(z, k, renormalise=False), G.top_k_gates(z, k)
    assert ((raw.weight > 0).sum(-1) == k).all()
    torch.testing.assert_close(raw.weight[raw.weight > 0], p[raw.weight > 0])
    assert (p.masked_fill(raw.weight > 0, -1).amax(-1) <= p.masked_fill(raw.weight == 0, 2).amin(-1)).all()
    if k > 1:
        torch.testing.assert_close(renormalised.weight.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    else:
        assert torch.equal(renormalised.weight, raw.weight)
    assert (raw.weight.gather(-1, raw.chosen).sum(-1) - raw.weight.sum(-1)).abs().max() < 1e-12


def test_top_one_gives_the_router_a_gradient() -> None:
    z = logits(0, 4).requires_grad_()
    G.top_k_gates(z, 1).weight.sum().backward()
    assert z.grad is not None and z.grad.abs().max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.floats(0.1, 1.0), st.data())
def test_adaptive_takes_the_smallest_sufficient_k(
    seed: int, experts: int, mass: float, data: st.DataObject
) -> None:
    k_max = data.draw(st.integers(1, experts))
    z = logits(seed, experts, scale=2.0)
    gates = G.adaptive_top_k_gates(z, k_max, mass, renormalise=False)
    for p, weight in zip(torch.softmax(z, -1).flatten(0, 1), gates.weight.flatten(0, 1), strict=True):
        ordered = p.sort(descending=True).values
        needed = next((k for k in range(1, k_max + 1) if ordered[:k].sum() >= mass), k_max)
        assert int((weight > 0).sum()) == needed
        torch.testing.assert_close(weight.sum(), ordered[:needed].sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 8), st.floats(0.3, 3.0))
def test_an_unborn_expert_changes_no_gate(seed: int, experts: int, temperature: float) -> None:
    z = logits(seed, experts + 1)
    maturity = torch.ones(experts + 1)
    maturity[-1] = 0
    grown = G.maturity_gates(z, maturity, temperature).weight
    before = G.maturity_gates(z[..., :-1], maturity[:-1], temperature).weight
    assert (grown[..., -1] == 0).all()
    torch.testing.assert_close(grown[..., :-1], before, rtol=1e-12, atol=1e-14)


def test_maturity_is_proportional() -> None:
    z, m = logits(3, 4), torch.tensor([1.0, 0.5, 0.25, 0.0])
    weight = m * torch.exp(z / 0.7)
    torch.testing.assert_close(G.maturity_gates(z, m, 0.7).weight, weight / weight.sum(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_gumbel_opens_with_probability_sigmoid_at_every_temperature(temperature: float) -> None:
    z = torch.tensor([-2.0, 0.0, 1.0]).expand(1, 20_000, 3)
    gates = G.gumbel_gates(z, temperature, torch.Generator().manual_seed(0))
    assert set(gates.weight.unique().tolist()) == {0.0, 1.0}
    error = (gates.weight.mean((0, 1)) - torch.sigmoid(z[0, 0])).abs()
    assert error.max() < 4 * 0.5 / math.sqrt(20_000)


def test_straight_through_has_the_value_of_hard_and_the_gradient_of_soft() -> None:
    z = logits(1, 3).requires_grad_()
    stream = torch.Generator().manual_seed(1)
    soft = G.gumbel_gates(z, 0.7, stream, hard=False).weight
    hard = G.gumbel_gates(z, 0.7, torch.Generator().manual_seed(1)).weight
    assert torch.equal(hard, (soft > 0.5).double())
    (gradient,) = torch.autograd.grad(hard.square().sum(), z, retain_graph=True)
    (wanted,) = torch.autograd.grad((2 * hard.detach() * soft).sum(), z)
    torch.testing.assert_close(gradient, wanted)


def test_without_a_generator_the_gate_is_the_threshold() -> None:
    z = logits(4, 3)
    assert torch.equal(G.gumbel_gates(z, 0.5, None).weight, G.threshold_gates(z).weight)


def test_bernoulli_log_prob_is_exact_and_its_score_has_mean_zero() -> None:
    z = torch.tensor([0.3, -1.2, 30.0], dtype=torch.float64).expand(1, 40_000, 3).clone().requires_grad_()
    gates, log_prob = G.bernoulli_gates(z, torch.Generator().manual_seed(2))
    wanted = torch.distributions.Bernoulli(logits=z).log_prob(gates.weight).sum(-1)
    torch.testing.assert_close(log_prob, wanted)
    (score,) = torch.autograd.grad(log_prob.mean(), z)
    assert score.sum((0, 1)).abs().max() < 4 * 0.5 / math.sqrt(40_000)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6))
def test_capacity_serves_the_first_and_never_a_pad(seed: int, experts: int, capacity: int) -> None:
    gates = G.top_k_gates(logits(seed, experts, tokens=7), min(2, experts))
    valid = torch.rand(2, 7, generator=torch.Generator().manual_seed(seed)) < 0.7
    limited, dropped = G.capacity_mask(gates, valid, capacity)
    served = torch.zeros(experts)
    asked = 0
    for row in range(2):
        for token in range(7):
            if not valid[row, token]:
                continue
            for expert in gates.weight[row, token].nonzero().flatten().tolist():
                asked += 1
                kept = served[expert] < capacity
                served[expert] += kept
                want = gates.weight[row, token, expert] if kept else 0.0
                assert limited.weight[row, token, expert] == want
    torch.testing.assert_close(
        dropped.double(), torch.tensor(1 - served.sum().item() / asked if asked else 0.0).double()
    )


def test_half_precision_logits_are_read_in_fp32() -> None:
    z = logits(0, 4).bfloat16()
    assert G.top_k_gates(z, 2).weight.dtype == torch.float32
    assert G.softmax_gates(z).logits.dtype == torch.float32


def test_young_experts_take_part_beside_the_top_k_of_the_others() -> None:
    """At m -> 0 the gates are the top-k's of the others, without a jump; every young one has a gate and a gradient."""
    stream = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 6, generator=stream, requires_grad=True)
    for m in (0.5, 1e-12):  # the second is what is left in ``gates``
        maturity = torch.tensor([1.0, 1.0, m, 1.0, 1.0, m])
        gates = G.maturity_gates(z, maturity, 0.7, 2, young=[2, 5])
        assert gates.chosen is not None and gates.chosen.shape[-1] == 4
        assert bool((gates.weight[..., [2, 5]] > 0).all()) and bool(((gates.weight > 0).sum(-1) == 4).all())
        torch.testing.assert_close(gates.weight.sum(-1), torch.ones(2, 5))
    old = G.maturity_gates(z[..., [0, 1, 3, 4]], torch.ones(4), 0.7, 2).weight
    torch.testing.assert_close(gates.weight[..., [0, 1, 3, 4]], old, atol=1e-6, rtol=1e-5)
