"""The gate in a plain loop: seed names, state, resume, every score."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from headgate.errors import CheckpointError, ConfigError
from headgate.methods.backward_gate import BackwardGate, BackwardGateConfig
from headgate.methods.backward_gate.memory import ExampleMemory
from headgate.methods.backward_gate.policies import pays

SIZES = {"d_hidden": 8, "vocab_size": 19, "m": 32, "k": 4, "window": 32, "total_steps": 100}
SCORES = [
    "novelty",
    "random",
    "loss",
    "loss_floor",
    "novelty_loss_floor",
    "entropy",
    "grad_norm_bound",
    "consensus",
    "permuted_novelty",
]


def forward(step: int, tokens: int = 6):
    g = torch.Generator().manual_seed(step)
    hidden = torch.randn(2, tokens, 8, generator=g)
    logits = torch.randn(2, tokens, 19, generator=g) * (1 + 0.5 * torch.rand((), generator=g))
    return hidden, logits, torch.randint(19, (2, tokens), generator=g)


def drive(gate: BackwardGate, steps: range) -> list[bool]:
    decisions = []
    for step in steps:
        z = gate.embed(*forward(step))
        decisions.append(gate.accept(gate.score(z)))
        if decisions[-1]:
            gate.update(z)
    return decisions


def test_the_original_loop_runs_with_the_original_names():
    gate = BackwardGate(
        d_hidden=8,
        vocab_size=19,
        m=32,
        k=4,
        target_novelty=0.30,
        target_novelty_scaler=10.0,
        novelty_ema_rate=0.01,
        burn_in=5,
        seed=0,
        device="cpu",
        reorth_every=128,
        k_topk=64,
    )
    assert gate.config.target_acceptance == 0.30 and gate.config.error_top_k == 64
    for step in range(12):
        z = gate.embed(*forward(step))
        novelty = gate.novelty(z)
        accept = gate.accept(novelty)
        assert 0 <= float(novelty) <= 1
        if accept:
            gate.update(z)
        gate.step()
    assert gate.acceptance_rate() >= 5 / 12


def test_a_seed_name_and_its_own_name_together_are_refused():
    with pytest.raises(ConfigError, match="the same setting"):
        BackwardGate(target_novelty=0.3, target_acceptance=0.2)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_holds_the_target(score):
    gate = BackwardGate(**SIZES, score=score, target_acceptance=0.3, burn_in=32, ema_rate=0.02, seed=1)
    decisions = drive(gate, range(632))
    assert all(decisions[:32])
    assert abs(sum(decisions[32:]) / 600 - 0.3) < 0.05


def test_replay_accepts_exactly_as_many():
    gate = BackwardGate(**SIZES, score="random", replay=[37, 120], burn_in=0)
    assert sum(drive(gate, range(120))) == 37


def test_infobatch_prunes_below_the_mean_and_rescales():
    gate = BackwardGate(**{**SIZES, "total_steps": 400}, score="infobatch", prune=0.5, burn_in=0)
    weights, kept = set(), []
    for step in range(400):
        z = gate.embed(*forward(step))
        score = gate.score(z)
        kept.append(gate.accept(score))
        weights.add(score.weight)
        assert score.probability in (0.5, 1.0)
        assert score.probability == 1.0 or step < 0.875 * 400
    assert weights == {1.0, 2.0}
    assert 0.6 < sum(kept[:350]) / 350 < 0.9 and all(kept[350:])


def test_inverse_probability_weights_are_those_of_the_decision():
    gate = BackwardGate(**SIZES, reweight="ipw", max_weight=4.0, burn_in=10)
    for step in range(120):
        score = gate.score(gate.embed(*forward(step)))
        gate.accept(score)
        expected = 1.0 if step < 10 else min(4.0, 1 / score.probability)
        assert score.weight == pytest.approx(expected)


def test_loss_floor_with_a_value_is_a_hard_floor():
    gate = BackwardGate(**SIZES, score="loss_floor", loss_floor=3.0, burn_in=0)
    for step in range(60):
        score = gate.score(gate.embed(*forward(step)))
        assert gate.accept(score) == (score.seen.loss > 3.0)


def test_full_acceptance_accepts_everything():
    assert all(drive(BackwardGate(**SIZES, target_acceptance=1.0, burn_in=0), range(80)))


def test_scoring_changes_nothing():
    gate = BackwardGate(**SIZES, burn_in=0)
    drive(gate, range(20))
    before = {k: v.clone() for k, v in gate.state_dict().items()}
    z = gate.embed(*forward(99))
    assert float(gate.score(z)) == float(gate.score(z))
    assert all(torch.equal(v, before[k]) for k, v in gate.state_dict().items())


@pytest.mark.parametrize("basis", ["frequent_directions", "bisector"])
def test_state_loads_strictly_and_goes_on_bitwise(basis):
    options = {**SIZES, "basis": basis, "burn_in": 10, "seed": 3, "fd_decay": 0.9, "refresh": 3}
    whole, half = BackwardGate(**options), BackwardGate(**options)
    drive(whole, range(60))
    drive(half, range(30))
    again = BackwardGate(**options)
    again.load_state_dict(half.state_dict(), strict=True)
    assert drive(again, range(30, 60)) == drive(whole, range(60, 60)) + drive(half, range(30, 60))
    state = whole.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_state_has_the_same_shape_from_the_first_step_to_the_last():
    gate = BackwardGate(**SIZES, burn_in=0)
    shapes = {k: v.shape for k, v in gate.state_dict().items()}
    drive(gate, range(50))
    assert {k: v.shape for k, v in gate.state_dict().items()} == shapes


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"signal": "backprop"}, {"basis": "bisector"}, {"error": "topk"}]
)
def test_other_sketch_settings_are_refused_on_load(change):
    saved = BackwardGate(**SIZES, seed=3).state_dict()
    with pytest.raises((CheckpointError, RuntimeError), match=r"settings|size mismatch"):
        BackwardGate(**{**SIZES, "seed": 3, **change}).load_state_dict(saved)


def test_precision_casts_leave_the_state_alone():
    gate = BackwardGate(**SIZES, burn_in=0)
    drive(gate, range(10))
    before = {k: v.clone() for k, v in gate.state_dict().items()}
    gate.to(torch.bfloat16)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in gate.state_dict().items())


def test_draws_do_not_touch_the_global_stream():
    gate = BackwardGate(**SIZES, score="random")
    torch.manual_seed(0)
    drive(gate, range(5))
    found = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(3))


def test_batches_without_labels_are_rejected_counted_and_leave_no_trace():
    gate = BackwardGate(**SIZES, burn_in=50)
    drive(gate, range(5))
    before = gate.state_dict()["gate.window.values"].clone()
    hidden, logits, labels = forward(7)
    z = gate.embed(hidden, logits, torch.full_like(labels, -100))
    assert gate.accept(gate.score(z)) is False
    assert int(gate.gate.empty) == 1
    assert torch.equal(gate.state_dict()["gate.window.values"], before)


def test_backprop_signal_needs_the_head_and_uses_it():
    gate = BackwardGate(**SIZES, signal="backprop")
    with pytest.raises(ConfigError, match=r"weight=model\.lm_head\.weight"):
        gate.embed(*forward(0))
    z = gate.embed(*forward(0), weight=torch.randn(19, 8))
    assert z.sketch.shape == (32,) and float(z.sketch.norm()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_acceptance": 0.0}, "target_acceptance"),
        ({"target_acceptance": 1.2}, "target_acceptance"),
        ({"k": 65, "m": 64}, "k=65 exceeds m=64"),
        ({"burn_in": 100, "total_steps": 100}, "never gate"),
        ({"d_hidden": 4}, "both d_hidden= and vocab_size="),
        ({"score": "loss", "replay": [1, 2]}, "score: random"),
        ({"score": "random", "replay": [3, 2]}, "accepted <= offered"),
        ({"granularity": "sequence", "memory": True}, "cannot be combined with memory"),
        ({"score": "token", "score_layer": 2}, "score_layer"),
        ({"novel": 1}, "novel"),
    ],
)
def test_bad_input_is_refused_with_its_name(options, message):
    with pytest.raises(ConfigError, match=message):
        BackwardGate(**options)


def test_the_default_burn_in_is_a_tenth_and_never_more_than_2000():
    config = BackwardGateConfig()
    assert config.resolved_burn_in(300) == 30
    assert config.resolved_burn_in(100_000) == 2000


def test_verbs_out_of_order_say_so():
    with pytest.raises(ConfigError, match="no sizes"):
        BackwardGate().embed(*forward(0))
    gate = BackwardGate(**SIZES)
    with pytest.raises(ConfigError, match="call score"):
        gate.accept()
    z, other = gate.embed(*forward(0)), gate.embed(*forward(1))
    gate.accept(gate.score(z))
    with pytest.raises(ConfigError, match="scored last"):
        gate.update(other)


def test_importance_sampling_pays_only_when_norms_are_uneven():
    even, uneven = torch.ones(100), torch.cat([torch.zeros(95), torch.full((5,), 50.0)])
    assert not pays(even, 0.3, 2.0)
    assert pays(uneven, 0.3, 2.0)


def test_memory_rejects_until_it_is_time_to_score_again():
    memory = ExampleMemory(1024, rescore_every=3)
    memory.remember(["a", "b"], epoch=0, accepted=False)
    memory.remember([7], epoch=0, accepted=True)
    assert memory.rejects(["a", "b", 7, "new"], 0).tolist() == [False] * 4
    for epoch in (1, 2):
        assert memory.rejects(["a", "b", 7, "new"], epoch).tolist() == [True, True, False, False]
    assert memory.rejects(["a"], 3).tolist() == [False]


def test_the_worked_example_learns_and_skips(capsys):
    path = Path(__file__).parents[2] / "examples" / "backward_gate_plain_loop.py"
    spec = importlib.util.spec_from_file_location("backward_gate_plain_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.main(["--steps", "150"])
    assert 0.25 < result["acceptance"] < 0.5
    assert result["last_loss"] < 0.8 * result["first_loss"]
    assert "accepted" in capsys.readouterr().out


def test_a_loop_of_ones_own_says_how_long_it_is() -> None:
    """Without a length the burn-in would be 2,000 steps: most such loops would never gate, and nothing would say so."""
    sizes = {key: value for key, value in SIZES.items() if key != "total_steps"}
    with pytest.raises(ConfigError, match="total_steps="):
        BackwardGate(**sizes)
    BackwardGate(**sizes, burn_in=5)
    BackwardGate(**sizes, target_acceptance=1.0)
