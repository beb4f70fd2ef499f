"""Laws of the depth budgets where constants matter: values, slopes, and soft gates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headgate.ops.depth import adaptivity, depth_penalty, lagrangian, threshold_for


@given(st.floats(0, 1), st.floats(0.1, 0.9), st.floats(-2, 2), st.floats(0, 5))
def test_the_lagrangian_and_its_slope(used: float, target: float, dual: float, damping: float) -> None:
    """lambda (u - t) + rho / 2 (u - t)^2; its slope in u is lambda + rho (u - t), and none goes to the dual."""
    u = torch.tensor(used, dtype=torch.float64, requires_grad=True)
    price = torch.tensor(dual, dtype=torch.float64, requires_grad=True)
    value = lagrangian(u, target, price, damping)
    gap = used - target
    assert float(value.detach()) == pytest.approx(dual * gap + damping / 2 * gap * gap)
    slope, of_dual = torch.autograd.grad(value, (u, price), allow_unused=True)
    assert float(slope) == pytest.approx(dual + damping * gap)
    assert of_dual is None


def test_adaptivity_of_soft_gates_is_their_mutual_information() -> None:
    """H(E p) - E H(p) by hand where both terms count: gates of 1/4 and 3/4 are less than a bit apart."""
    valid = torch.tensor([[True, True, False]])
    gates = torch.tensor([[[0.25, 0.5], [0.75, 0.5], [1.0, 0.0]]])
    inner = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    wanted = torch.tensor([math.log(2) - inner, 0.0])
    torch.testing.assert_close(adaptivity(gates, valid), wanted)
    # one gate for all tokens depends on none
    torch.testing.assert_close(adaptivity(torch.tensor([[[0.3]]]), valid), torch.tensor([0.0]))


def test_the_price_of_a_gate_rises_from_nothing_to_all_with_its_depth() -> None:
    """lambda sum w_l g_l by hand; a single gate is the last one too, and pays in full."""
    assert float(depth_penalty(torch.tensor([0.9, 0.5, 0.25]), 2.0)) == pytest.approx(2 * (0.5 * 0.5 + 0.25))
    assert float(depth_penalty(torch.tensor([0.3]), 2.0)) == pytest.approx(0.6)


@pytest.mark.parametrize(("wanted", "threshold"), [(0.0, 6.0), (1.0, 4.0), (2.0, 2.0), (3.0, 0.0)])
def test_a_threshold_lies_half_way_or_one_beyond_the_extremes(wanted: float, threshold: float) -> None:
    """Logits 5, 3 and 1, worth one each; a fourth, of -8, does not count."""
    logits, counted = torch.tensor([3.0, -8.0, 5.0, 1.0]), torch.tensor([True, False, True, True])
    assert float(threshold_for(logits, torch.ones(4), torch.tensor(wanted), counted)) == threshold
