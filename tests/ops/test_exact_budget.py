"""Exact budgets: what is asked for opens, and depth as such has no gradient."""

from __future__ import annotations

import pytest
import torch

from headgate.ops.exact_budget import exact_gates


def entries(number: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, generator=stream, dtype=torch.float64) * 3
    worth = torch.rand(number, generator=stream, dtype=torch.float64) + 0.5
    counted = torch.rand(number, generator=stream) < 0.8
    return logits, worth, counted


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_the_budget_is_spent(share: float) -> None:
    """Counted entries are worth what is wanted, within half of the largest one; the highest logits are the open ones."""
    logits, worth, counted = entries()
    wanted = share * worth[counted].sum()
    gates = exact_gates(logits, worth, counted, wanted, 1.0)
    assert set(gates.tolist()) <= {0.0, 1.0}
    spent = (gates * worth)[counted].sum()
    assert abs(float(spent - wanted)) <= float(worth.max()) / 2 + 1e-9
    opened, closed = logits[counted & (gates == 1)], logits[counted & (gates == 0)]
    if len(opened) and len(closed):
        assert float(opened.min()) > float(closed.max())


def test_no_price_has_a_gradient() -> None:
    """Any price on what is spent leaves the gradient as it was: the loss sorts the gates and cannot open more of them."""
    logits, worth, counted = entries()
    need = torch.randn(len(logits), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    need = need.masked_fill(~counted, 0)
    found = []
    for price in (0.0, 7.0, -100.0):
        z = logits.clone().requires_grad_()
        gates = exact_gates(z, worth, counted, 0.5 * worth[counted].sum(), 1.0)
        (gates * (need + price * worth * counted)).sum().backward()
        assert z.grad is not None
        found.append(z.grad)
    assert float(found[0].abs().max()) > 1e-2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-9, rtol=1e-9)
    assert float(found[0].sum()) == pytest.approx(0, abs=1e-9)  # raising all logits alike changes nothing


def test_a_need_that_all_share_moves_nothing_and_one_that_differs_does() -> None:
    """The gradient opens where the loss falls most for what it costs, whatever the level of need."""
    z = torch.zeros(4, requires_grad=True)
    counted = torch.ones(4, dtype=torch.bool)
    gates = exact_gates(z, torch.ones(4), counted, torch.tensor(2.0), 1.0)
    (gates * torch.tensor([-5.0, -5.0, -5.0, -9.0])).sum().backward()
    assert z.grad is not None
    assert z.grad[3] < 0 < z.grad[0] and torch.allclose(z.grad[:3], z.grad[0].expand(3))


def test_what_is_not_counted_moves_nothing() -> None:
    logits, worth, counted = entries()
    wanted = 0.5 * worth[counted].sum()
    ours = exact_gates(logits, worth, counted, wanted, 1.0)
    moved = logits.masked_fill(~counted, 50.0)
    assert torch.equal(exact_gates(moved, worth, counted, wanted, 1.0)[counted], ours[counted])
    none = torch.zeros(3, dtype=torch.bool)
    gates = exact_gates(torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3), none, torch.tensor(1.0), 1.0)
    assert gates.tolist() == [0.0, 0.0, 1.0]
