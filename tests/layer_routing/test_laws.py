"""The mathematics alone: REINFORCE, budgets, thresholds, distillation, gates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headgate.ops.depth import (
    adaptivity,
    depth_penalty,
    dual_ascent,
    lagrangian,
    target_penalty,
    threshold_for,
    utilization,
)
from headgate.ops.distillation import distillation_loss
from headgate.ops.gating import bernoulli_gates
from headgate.ops.layer_gates import drop_rates, gated, hashed_uniform, monotone, top_tokens
from headgate.ops.routing_losses import reinforce_loss
from headgate.testing import examine


def test_reinforce_is_the_gradient_of_expected_cost() -> None:
    """Exact over the 2^3 masks, sign included; and the sampled estimate agrees with it."""
    logit = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    price = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)

    def cost(mask: torch.Tensor) -> torch.Tensor:
        return (mask * price).sum() + 0.8 * mask[0] * mask[2]

    masks = [torch.tensor(m, dtype=torch.float64) for m in itertools.product((0.0, 1.0), repeat=3)]
    p = torch.sigmoid(logit)
    probs = [torch.where(m == 1, p, 1 - p).prod() for m in masks]
    (exact,) = torch.autograd.grad(sum(q * cost(m) for q, m in zip(probs, masks, strict=True)), logit)
    estimate = torch.zeros(3, dtype=torch.float64)
    for q, mask in zip(probs, masks, strict=True):
        log_prob = -torch.nn.functional.softplus((1 - 2 * mask) * logit).sum()
        (one,) = torch.autograd.grad(reinforce_loss(log_prob, 0.37 - cost(mask)), logit)
        estimate += float(q.detach()) * one
    torch.testing.assert_close(estimate, exact)
    stream, sampled, count = torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.float64), 4000
    for _ in range(count):
        gates, log_prob = bernoulli_gates(logit.view(1, 1, 3), stream)
        (one,) = torch.autograd.grad(reinforce_loss(log_prob, 0.37 - cost(gates.weight.flatten())), logit)
        sampled += one / count
    torch.testing.assert_close(sampled, exact, atol=0.04, rtol=0.1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=30, unique=True),
    st.floats(0, 1),
)
@example([0.0, 5.0, 4.999999999999999], 0.25)
def test_threshold_opens_what_is_wanted(values: list[float], share: float) -> None:
    logit = torch.tensor(values, dtype=torch.float64)
    worth = torch.full_like(logit, 1 / len(values))
    wanted = torch.tensor(share, dtype=torch.float64)
    threshold = threshold_for(logit, worth, wanted, torch.ones_like(logit, dtype=torch.bool))
    opened = float((worth * (logit > threshold)).sum())
    assert abs(opened - share) <= 0.5 / len(values) + 1e-6
    beside = torch.cat([torch.full_like(logit, 9.0), logit]), torch.cat([worth, worth])
    counted = torch.arange(2 * len(logit)) >= len(logit)
    assert threshold_for(*beside, wanted, counted) == threshold, "what does not count has moved it"
    assert threshold_for(*beside, wanted, torch.zeros_like(counted)).isnan()


def test_dual_ascent_holds_the_target_and_budgets_have_their_gradients() -> None:
    """A loss that wants full depth: the dual makes it stop at the target."""
    logit, dual = torch.zeros(1, requires_grad=True), torch.zeros(())
    for _ in range(4000):
        used = torch.sigmoid(logit).mean()
        (grad,) = torch.autograd.grad(-0.5 * used + lagrangian(used, 0.6, dual, 2.0), logit)
        with torch.no_grad():
            logit -= 0.5 * grad
        dual = dual_ascent(dual, used, 0.6, 0.01)
    assert float(torch.sigmoid(logit.detach())) == pytest.approx(0.6, abs=1e-3)
    assert float(dual) == pytest.approx(0.5, abs=1e-2)
    mean = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    (grad,) = torch.autograd.grad(depth_penalty(mean, 2.0), mean)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1.0, 2.0]))
    assert float(target_penalty(torch.tensor(0.7), 0.5, 10.0)) == pytest.approx(0.4)


def test_utilization_counts_real_tokens_of_all_blocks() -> None:
    gate = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    share = torch.full((2,), 0.25)
    valid = torch.tensor([[True, True, False]])
    assert float(utilization(gate, valid, share, 0.5)) == pytest.approx(0.5 + 0.25 + 0.125)
    assert float(utilization(torch.ones(1, 1, 2), valid, share, 0.5)) == 1.0


def test_adaptivity_is_mutual_information() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    gates = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]])
    torch.testing.assert_close(adaptivity(gates, valid), torch.tensor([0.0, math.log(2)]))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_distillation_is_the_plain_formula(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import headgate.ops.distillation as module

    stream = torch.Generator().manual_seed(0)
    student = torch.randn(7, 5, generator=stream, requires_grad=True)
    teacher, weight = torch.randn(7, 5, generator=stream), torch.randn(11, 5, generator=stream)

    def logits(h: torch.Tensor) -> torch.Tensor:
        z = h @ weight.T
        return (softcap * torch.tanh(z / softcap) if softcap else z) / 2

    p, q = logits(teacher).softmax(-1), logits(student).log_softmax(-1)
    plain = 4 * (p * (p.log() - q)).sum(-1).mean()
    (expected,) = torch.autograd.grad(plain, student)
    for size in (22, 1 << 20):  # chunks of two rows, and one chunk
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", size)
        ours = distillation_loss(student, teacher, weight, temperature=2.0, softcap=softcap)
        (grad,) = torch.autograd.grad(ours, student)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(grad, expected)
    assert float(distillation_loss(teacher, teacher, weight, softcap=softcap)) == pytest.approx(0, abs=1e-5)


def test_gate_rules() -> None:
    x, fx = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(gated(x, fx, torch.ones(3, 1)), fx) and torch.equal(gated(x, fx, torch.zeros(3, 1)), x)
    assert monotone(torch.tensor([1.0, 0.0, 1.0])).tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(drop_rates(22, 4, 0.5, "linear")[[0, -1]], torch.tensor([0.0, 0.5]))
    logits = torch.tensor([[[3.0], [1.0], [2.0], [9.0]]])
    valid = torch.tensor([[True, True, True, False]])
    assert top_tokens(logits, valid, 0.5).flatten().tolist() == [True, False, True, False]
    drawn = hashed_uniform(torch.arange(20_000), 2, 7)
    assert drawn.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.03
    assert torch.equal(drawn[5:6], hashed_uniform(torch.tensor([5]), 2, 7))


def test_gates_drawn_at_inference_are_drawn_alike_after_loading() -> None:
    """A random policy draws from the run's seed, which the saved run knows too."""
    (result,) = examine(
        "layer_routing",
        laws=["what is saved is what was live"],
        policy="random",
        granularity="token",
        kd=False,
    )
    assert result.verdict == "kept", result.detail
