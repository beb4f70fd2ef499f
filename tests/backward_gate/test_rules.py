"""Which batches a rule takes: the dose is exact, what stands out is found, exhausted gradients are not taken for new."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headgate.errors import ConfigError, DataError
from headgate.experiments.benchmarks.separation import RULES, SHARE, gated
from headgate.methods.backward_gate import BackwardGate, BackwardGateConfig
from headgate.methods.backward_gate.truth import TRUTH, truth_maker
from headgate.ops import control
from tests.training.conftest import make_rows

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=24)


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.floats(0.01, 1.0))
def test_the_quantile_takes_exactly_its_share_whatever_the_scores(values, share) -> None:
    """Every value of a sample is equally likely to come last; averaged over that, acceptance is the share."""
    total = 0.0
    for last in range(len(values)):
        others = double(values[:last] + values[last + 1 :])
        total += control.quantile_probability(double(values[last]), others, share)
    assert total / len(values) == pytest.approx(share, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(SCORES, st.floats(0.01, 0.99))
def test_a_higher_score_is_never_less_likely(values, share) -> None:
    ordered = [control.quantile_probability(double(v), double(values), share) for v in range(-4, 5)]
    assert ordered == sorted(ordered)


@settings(max_examples=50, deadline=None)
@given(SCORES)
def test_what_stands_out_does_not_depend_on_scale_or_origin(values) -> None:
    share = control.outstanding_share(double(values))
    assert 0 <= share < 0.5
    assert control.outstanding_share(double(values) * 4 + 8) == share, "exact in binary"


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.45])
def test_a_clear_minority_stands_out_to_a_row(share) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(200, generator=g, dtype=torch.float64)
    values[: int(200 * share)] += 20
    assert control.outstanding_share(values) == pytest.approx(share)
    assert control.outstanding_share(values[int(200 * share) :]) == 0


def test_a_floor_bounds_every_inverse_weight_and_belongs_to_a_fixed_dose() -> None:
    for p in (0.0, 0.3, 1.0):
        assert 0.05 <= control.with_floor(p, 0.05) <= 1
    assert control.with_floor(control.share_above_floor(0.3, 0.05), 0.05) == pytest.approx(0.3)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([0.08, 0.3, 0.7]), st.sampled_from([10.0, 40.0]))
def test_the_controllers_law_holds_under_any_bursts_or_the_threshold_stands_at_its_bound(
    data, target, beta
) -> None:
    """|mean acceptance - target| <= (|tau_T - tau_0| / rate + 1 / (10 rate)) / T, for every sequence of scores."""
    rate, steps = 0.02, 600
    runs = data.draw(st.lists(st.tuples(st.integers(5, 200), st.floats(0, 1)), min_size=2, max_size=8))
    scores = [level for length, level in runs for _ in range(length)]
    scores = (scores * (steps // len(scores) + 1))[:steps]
    bounds = control.threshold_bounds(beta)
    start = tau = double(control.initial_threshold(target, beta))
    average, g, accepted, saturated = double(target), torch.Generator().manual_seed(0), 0.0, False
    for score in scores:
        taken = float(torch.rand((), generator=g) < control.acceptance_probability(double(score), tau, beta))
        tau, average = control.control(tau, average, double(taken), target, rate, bounds)
        accepted, saturated = accepted + taken, saturated or float(tau) in bounds
    assume(not saturated)
    bound = (abs(float(tau - start)) / rate + 1 / (10 * rate)) / steps
    assert abs(accepted / steps - target) <= bound + 1e-9


SEPARATION = {name: RULES[name] for name in ("original", "novelty, beta 10", "novelty", "energy, adaptive")}


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], object]:
    kinds = ("frozen", "live")
    return {(rule, kind): gated(kind, options) for rule, options in SEPARATION.items() for kind in kinds}


def test_a_steep_sigmoid_separates_where_a_soft_one_cannot(table) -> None:
    soft, steep = table["novelty, beta 10", "frozen"], table["novelty", "frozen"]
    assert min(soft.auroc, steep.auroc) > 0.95, "the scores themselves separate"
    assert steep.share(True) > soft.share(True) + 0.1
    assert steep.share(False) < soft.share(False)


def test_normalised_novelty_goes_blind_on_a_model_that_learns_and_energy_does_not(table) -> None:
    assert table["novelty", "frozen"].auroc > 0.95 > 0.65 > table["novelty", "live"].auroc
    assert table["original", "live"].share(True) < 0.3
    assert table["energy, adaptive", "live"].auroc > 0.95
    assert table["energy, adaptive", "live"].share(True) > 0.9
    assert table["energy, adaptive", "live"].share(False) < 0.05


@pytest.mark.slow
def test_a_fixed_quantile_refuses_clusters_and_an_adaptive_dose_takes_them() -> None:
    fixed = [gated("bursts", RULES["energy, quantile"], seed) for seed in range(3)]
    adaptive = [gated("bursts", RULES["energy, adaptive"], seed) for seed in range(3)]
    assert sum(o.share(True) for o in fixed) / 3 < 0.8
    assert sum(o.share(True) for o in adaptive) / 3 > 0.88
    assert sum(o.share(False) for o in adaptive) / 3 < SHARE


def test_a_constant_stream_is_learned_from_at_the_target() -> None:
    """Nothing stands out: the dose is the target, drawn by lot."""
    for dose in ("fixed", "adaptive"):
        gate = BackwardGate(
            d_hidden=4,
            vocab_size=5,
            m=16,
            k=2,
            burn_in=0,
            total_steps=400,
            rule="quantile",
            score="loss",
            dose=dose,
        )
        hidden, logits, labels = (
            torch.ones(1, 6, 4),
            torch.zeros(1, 6, 5),
            torch.zeros(1, 6, dtype=torch.long),
        )
        z = gate.embed(hidden, logits, labels)
        taken = sum(gate.accept(gate.score(z)) for _ in range(400))
        assert abs(taken / 400 - 0.3) < 0.08


def test_presets_keep_the_originals_rule_and_what_is_written_wins() -> None:
    original = BackwardGateConfig(preset="original")
    assert (original.beta, original.basis, original.rank, original.center) == (10.0, "bisector", False, False)
    assert BackwardGateConfig(preset="original", beta=5.0).beta == 5.0
    assert BackwardGateConfig().beta >= 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "random", "rule": "quantile"}, "top of an order"),
        ({"dose": "adaptive"}, "set rule: quantile"),
        ({"score": "energy", "rank": False}, "keep rank: true"),
        ({"floor": 0.3}, "leaves nothing of target_acceptance=0.3"),
        ({"floor": 0.1, "score": "random"}, "by lot"),
        ({"score": "oracle"}, "reads the truth from a data column"),
        ({"column": "family"}, "reads the truth from a data column"),
        ({"column_values": ["farm"]}, "name it, as in column"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        BackwardGate(**options)


def test_the_oracle_learns_from_what_the_column_says_and_nothing_else(make_trainer) -> None:
    rows = [{**row, TRUTH: int(place % 8 == 3)} for place, row in enumerate(make_rows(64))]
    gate = BackwardGate(
        m=64, k=8, window=16, burn_in=0, score="oracle", column="kind", rule="quantile", dose="adaptive"
    )
    trainer = make_trainer(
        methods=[gate],
        data=rows,
        arguments={"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "max_steps": 64},
    )
    seen: list[tuple[int, bool]] = []
    inner = trainer.data_collator

    def collate(batch):
        return {**inner(batch), TRUTH: torch.tensor([row[TRUTH] for row in batch])}

    trainer.data_collator = collate
    vote = gate.vote

    def watched(step):
        decision = vote(step)
        if decision is not None and step.phase == "forward":
            seen.append((int(step.batch[TRUTH]), bool(decision)))
        return decision

    gate.vote = watched
    trainer.train()
    first = next(i for i, (new, _) in enumerate(seen) if new)
    after = seen[first:]
    assert all(taken for new, taken in after if new)
    assert sum(taken for new, taken in after if not new) <= 4, "only where no new row is left in the window"


def test_truth_is_a_value_or_a_flag_and_a_missing_column_is_named() -> None:
    by_value, by_flag = truth_maker("family", ["farm"]), truth_maker("fresh", None)
    assert [by_value({"family": f}) for f in ("farm", "toys")] == [1, 0]
    assert [by_flag({"fresh": f}) for f in (True, False)] == [1, 0]
    with pytest.raises(DataError, match=r"'family'.*it has: prompt, family2"):
        by_value({"prompt": "x", "family2": 1})
