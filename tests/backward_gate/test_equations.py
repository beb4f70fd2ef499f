"""The gate's equations at the points where a wrong constant shows: slopes, break-evens, schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headgate.methods.backward_gate import BackwardGate
from headgate.methods.backward_gate.gate import Score
from headgate.methods.backward_gate.policies import Measured, pays, raw_score, replay_probability
from headgate.methods.backward_gate.reporting import mean_loss, totals
from headgate.modules.accepted_subspace import AcceptedSubspace
from headgate.ops import subspace
from headgate.ops.control import acceptance_probability

from .test_drop_in import SIZES, forward


@given(st.floats(-1, 2), st.floats(-1, 2), st.floats(1, 50))
def test_acceptance_is_a_logistic_of_slope_beta(score: float, threshold: float, beta: float) -> None:
    p = acceptance_probability(
        torch.tensor(score, dtype=torch.float64), torch.tensor(threshold, dtype=torch.float64), beta
    )
    assert float(p) == pytest.approx(1 / (1 + math.exp(-beta * (score - threshold))), abs=1e-12)


@pytest.mark.parametrize(("acceptance", "cost_ratio"), [(0.3, 1.0), (0.5, 2.0), (0.25, 0.5)])
def test_importance_sampling_pays_from_the_break_even_on(acceptance: float, cost_ratio: float) -> None:
    """Of n equal norms and no others among W the gain is sqrt(W / n): it pays beyond (1 + rho a) / (a (1 + rho))."""
    break_even = (1 + cost_ratio * acceptance) / (acceptance * (1 + cost_ratio))
    window = 4000
    for number in (20, 200, 400, 700, 1500, 3000):
        norms = torch.zeros(window, dtype=torch.float64)
        norms[:number] = 7.0
        assert pays(norms, acceptance, cost_ratio) == (math.sqrt(window / number) > break_even), number
    assert not pays(torch.tensor([3.0]), acceptance, cost_ratio), "one norm has no spread"
    assert not pays(torch.zeros(9), acceptance, cost_ratio)
    assert not pays(torch.ones(64), 1.0, cost_ratio), (
        "at full acceptance equal norms break even, and even is no gain"
    )


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 2**32))
def test_selection_sampling_accepts_exactly_what_it_should_and_every_order_alike(
    total: int, wanted: int, seed: int
) -> None:
    """Knuth's Algorithm S: at each point the share of what is still wanted among what is still to come."""
    wanted = min(wanted, total)
    stream = torch.Generator().manual_seed(seed)
    accepted = 0
    for offered in range(total):
        p = replay_probability(accepted, offered, wanted, total)
        assert p == (wanted - accepted) / (total - offered)
        accepted += float(torch.rand((), generator=stream, dtype=torch.float64)) < p
    assert accepted == wanted
    assert replay_probability(accepted, total, wanted, total) == 0.0


def test_the_threshold_rests_in_the_burn_in_and_moves_at_every_decision_after() -> None:
    method = BackwardGate(**{**SIZES, "burn_in": 5}, seed=1)
    thresholds, decisions = [], []
    for step in range(12):
        method.accept(method.score(method.embed(*forward(step))))
        thresholds.append(float(method.gate.window.threshold))
        decisions.append(int(method.gate.window.decisions))
    assert len(set(thresholds[:5])) == 1 and decisions[:5] == [0] * 5
    assert decisions[5:] == list(range(1, 8))
    assert all(a != b for a, b in itertools.pairwise(thresholds[4:]))


def test_decay_weighs_a_row_by_its_age() -> None:
    """After n more rows the sketch holds decay^n of a row's square: the root stands on the row itself."""
    module = AcceptedSubspace(6, 2, decay=0.5, refresh=100)
    for place in range(3):
        module.update(torch.eye(6)[place])
    energy = module.buffer_RM.square().sum(0)
    torch.testing.assert_close(energy, torch.tensor([0.25, 0.5, 1.0, 0, 0, 0]))


def test_the_basis_is_renewed_every_refresh_updates_once_it_is_full() -> None:
    """Between two renewals it is bitwise the old one; at each it is the sketch's top directions."""
    module = AcceptedSubspace(8, 2, refresh=4)
    stream = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(17, 8, generator=stream), dim=1)
    for number, row in enumerate(rows, start=1):
        before = module.basis_MK.clone()
        module.update(row)
        if number <= 2:
            assert int(module.rank) == number, "a direction with room for it is taken in at once"
        elif number % 4:
            assert torch.equal(module.basis_MK, before), number
        else:
            wanted = subspace.top_directions(module.buffer_RM[: int(module.rows)], 2)
            assert torch.equal(module.basis_MK, wanted) and not torch.equal(wanted, before), number


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("novelty", 0.25),
        ("permuted_novelty", 0.25),
        ("novelty_loss_floor", 0.25),
        ("energy", math.log(8 * 0.5)),
        ("sketch_norm", math.log(8)),
        ("oracle", 0.75),
        ("loss", 3.0),
        ("loss_floor", 3.0),
        ("infobatch", 3.0),
        ("entropy", 2.5),
        ("consensus", -0.5),
        ("grad_norm_bound", 1.5),
        ("token", 0.0),
    ],
)
def test_every_score_is_the_measurement_of_the_table(kind: str, value: float) -> None:
    seen = Measured(
        novelty=0.25,
        alignment=-0.5,
        tokens=10,
        loss=3.0,
        entropy=2.5,
        error_norm=1.5,
        sketch_norm=8.0,
        truth=0.75,
    )
    assert raw_score(kind, seen) == pytest.approx(value)


def test_a_loss_is_a_mean_over_tokens_and_zero_over_none() -> None:
    assert [mean_loss(torch.tensor(6.0), torch.tensor(n)) for n in (3, 1)] == [2.0, 6.0]
    assert mean_loss(torch.tensor(0.0), torch.tensor(0)) == 0.0


def test_the_losses_of_all_and_of_the_accepted_are_means_over_tokens() -> None:
    gate = BackwardGate(d_hidden=4, vocab_size=5, m=16, k=2, burn_in=0).gate
    assert gate is not None
    for loss, tokens, p in ((2.0, 1, 1.0), (4.0, 3, 1.0), (9.0, 4, 0.0)):
        seen = Measured(0.5, 0.0, tokens, loss, 0.0, 0.0, 0.0, 0.0)
        nothing = torch.zeros(16)
        gate.accept(Score(seen, 0.5, 0.5, 0.5, p, 1.0, nothing, nothing), optimizer_step=0)
    figures = totals(gate, None)
    assert figures["gate/loss_all"] == (2 + 12 + 36) / 8
    assert figures["gate/loss_accepted"] == (2 + 12) / 4
