"""What an accepted micro-batch must be worth, from the cost of a gate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.ops.payoff import advantage, break_even, oracle_worth, relative_cost, required_worth

SHARES = st.floats(0.01, 0.99)


@pytest.mark.parametrize(("rho", "scored", "w"), [(1.0, 1.0, 0.2308), (2.0, 1.0, 0.375), (1.0, 0.25, 0.6774)])
def test_the_bound_at_three_tenths(rho, scored, w) -> None:
    cost = relative_cost(0.3, rho, scored)
    assert break_even(0.3, cost) == pytest.approx(w, abs=1e-4)
    if scored == 1.0:
        assert required_worth(0.3, cost) == pytest.approx((1 + rho * 0.3) / ((1 + rho) * 0.3))


@given(SHARES, st.floats(0.2, 4), st.floats(0.05, 1))
def test_at_break_even_an_oracle_neither_wins_nor_loses(a, rho, scored) -> None:
    cost = relative_cost(a, rho, scored)
    w = break_even(a, cost)
    assert advantage(oracle_worth(a, a, w), a, cost) == pytest.approx(1)
    assert (
        advantage(oracle_worth(a, a, w - 0.01), a, cost)
        > 1
        > advantage(oracle_worth(a, a, w + 0.01), a, cost)
    )


@given(SHARES, SHARES, st.floats(0, 1))
def test_an_oracle_is_worth_between_one_and_all_of_the_fresh(a, fresh, w) -> None:
    worth = oracle_worth(a, fresh, w)
    assert 1 - 1e-9 <= worth <= 1 / (fresh + (1 - fresh) * w) + 1e-9
    assert oracle_worth(a, fresh, 1.0) == pytest.approx(1), (
        "where repeats are as good, choosing is worth nothing"
    )


@given(SHARES, st.floats(0.2, 4))
def test_costs_order_as_the_work_does(a, rho) -> None:
    whole, early = relative_cost(a, rho), relative_cost(a, rho, 0.25)
    again = relative_cost(a, rho, again=True)
    assert early < whole < again
    assert whole == pytest.approx((1 + rho * a) / (1 + rho))
    assert relative_cost(1.0, rho) == pytest.approx(1), "what accepts everything costs what training costs"
