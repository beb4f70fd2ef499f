"""The gate inside HeadgateTrainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from headgate.data.collation import Collator
from headgate.errors import CheckpointError, ConfigError
from headgate.methods.backward_gate import BackwardGate
from headgate.methods.backward_gate.auto_off import AutoOff
from headgate.methods.backward_gate.diagnostic import ProxyDiagnostic
from headgate.methods.backward_gate.views import LEFT_OUT
from headgate.methods.step import Step
from headgate.models.anatomy import describe
from headgate.models.load import load_model
from headgate.ops.subspace import unit
from headgate.training.telemetry import is_known
from tests.training.conftest import Toy, make_rows, same, trained

SMALL = {"m": 64, "k": 8, "window": 16, "ema_rate": 0.05}
ONE = {"arguments": {"gradient_accumulation_steps": 1, "max_steps": 24}}


def gate_of(trainer) -> BackwardGate:
    return trainer.methods.by_name["backward_gate"]


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_at_full_acceptance_it_is_the_ungated_trainer_bitwise(make_trainer, loss) -> None:
    plain = make_trainer("plain", loss=loss, lora_dropout=0.1)
    gated = make_trainer(
        "gated", loss=loss, lora_dropout=0.1, methods=[BackwardGate(**SMALL, target_acceptance=1.0)]
    )
    plain.train()
    gated.train()
    assert losses(plain) == losses(gated)
    assert same(trained(plain), trained(gated))
    assert gate_of(gated).summary()["acceptance_rate"] == 1.0


class Witness(TrainerCallback):
    """Parameters and optimizer moments before and after every optimizer step, beside the gate's decisions."""

    def __init__(self) -> None:
        self.trainer, self.changed, self.accepted = None, [], []

    def _state(self) -> list[torch.Tensor]:
        moments = [v for s in self.trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        return [p.detach().clone() for p in [*trained(self.trainer).values(), *moments]]

    def on_step_begin(self, args, state, control, **_):
        self.before, self.count = self._state(), int(gate_of(self.trainer).gate.accepted)

    def on_step_end(self, args, state, control, **_):
        after = self._state()
        moved = len(after) != len(self.before) or not all(map(torch.equal, after, self.before))
        self.changed.append(moved)
        self.accepted.append(int(gate_of(self.trainer).gate.accepted) > self.count)


def test_a_rejected_micro_batch_leaves_everything_untouched(make_trainer) -> None:
    witness = Witness()
    gate = BackwardGate(**SMALL, target_acceptance=0.3, burn_in=4)
    trainer = make_trainer(methods=[gate], callbacks=[witness], **ONE)
    witness.trainer = trainer
    trainer.train()
    assert witness.changed == witness.accepted
    assert all(witness.accepted[:4])
    assert 0 < sum(witness.accepted[4:]) < 16


@pytest.mark.parametrize("signal", ["head", "backprop"])
def test_plain_and_chunked_loss_decide_alike(make_trainer, signal) -> None:
    found = []
    for loss in ("plain", "chunked"):
        gate = BackwardGate(**SMALL, burn_in=2, signal=signal)
        trainer = make_trainer(loss, loss=loss, methods=[gate], **ONE)
        trainer.train()
        found.append([row["gate/accept"] for row in trainer.state.log_history if "gate/accept" in row])
    assert found[0] == found[1]
    assert len(set(found[0])) == 2


@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_resume_is_bitwise(make_trainer, tmp_path: Path, loss) -> None:
    options = {"loss": loss, "arguments": {"max_steps": 12, "gradient_accumulation_steps": 2}}
    whole = make_trainer("whole", methods=[BackwardGate(**SMALL, burn_in=2)], **copy.deepcopy(options))
    whole.train()
    again = make_trainer("again", methods=[BackwardGate(**SMALL, burn_in=2)], **copy.deepcopy(options))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(trained(again), trained(whole))
    mine, theirs = gate_of(again).state_dict(), gate_of(whole).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("options", [{"granularity": "sequence", "pool_factor": 3}, {"memory": True}])
def test_resume_is_bitwise_where_the_gate_forms_the_batches(make_trainer, tmp_path: Path, options) -> None:
    """What the pool and the packer hold is in the checkpoint, beside the place in the data; passes go on."""

    def gated(folder: str):
        trainer = make_trainer(
            folder,
            methods=[BackwardGate(**SMALL, burn_in=2, target_acceptance=0.5, **options)],
            data=make_rows(22),
            loss="chunked",
        )
        trainer.data_collator = WithIds(0)
        return trainer

    whole, again = gated("whole"), gated("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(trained(again), trained(whole))
    mine, theirs = gate_of(again).state_dict(), gate_of(whole).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (again.batches.turn, again.batches.taken) == (whole.batches.turn, whole.batches.taken)
    assert whole.batches.turn >= 1


def test_a_trainer_trains_on_the_selected_sequences(make_trainer) -> None:
    """Every micro-batch is full, nothing is rejected after its forward, and the acceptance counts sequences."""
    gate = BackwardGate(**SMALL, burn_in=2, target_acceptance=0.4, granularity="sequence", pool_factor=2)
    trainer = make_trainer(methods=[gate], loss="chunked", data=make_rows(60))
    trainer.train()
    accepted, offered = int(gate.gate.accepted), int(gate.gate.offered)
    assert trainer.state.global_step == 12
    assert 0 <= accepted - 12 * 2 * 4 < 4 * (2 + 1), "24 batches of 4, and what the last pool left over"
    assert offered > 1.3 * accepted


def test_an_epoch_of_formed_batches_has_no_length(make_trainer) -> None:
    gate = BackwardGate(**SMALL, granularity="sequence")
    trainer = make_trainer(methods=[gate], arguments={"max_steps": -1, "num_train_epochs": 2})
    with pytest.raises(ConfigError, match=r"set training\.max_steps"):
        trainer.train()


def test_resume_with_other_sketch_settings_is_refused(make_trainer, tmp_path: Path) -> None:
    make_trainer("whole", methods=[BackwardGate(**SMALL, burn_in=2)]).train()
    other = make_trainer("again", methods=[BackwardGate(**{**SMALL, "m": 128}, burn_in=2)])
    with pytest.raises(CheckpointError, match="m was 64"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))


def test_a_burn_in_as_long_as_the_run_is_refused(make_trainer) -> None:
    trainer = make_trainer(methods=[BackwardGate(burn_in=12)])
    with pytest.raises(ConfigError, match="never gate"):
        trainer.train()


def test_telemetry_and_summary(make_trainer) -> None:
    gate = BackwardGate(**SMALL, burn_in=2, diagnostic_every=1)
    trainer = make_trainer(methods=[gate], **ONE)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "gate/accept" in row]
    names = {name for row in rows for name in row if name.startswith("gate/")}
    assert {
        "gate/novelty",
        "gate/score",
        "gate/threshold",
        "gate/acceptance_rate",
        "gate/accepted_steps",
    } <= names
    assert {"gate/total_steps", "gate/milliseconds", "gate/loss_all", "gate/loss_accepted"} <= names
    assert all(is_known(name, BackwardGate.telemetry_names) for name in names)
    assert rows[0]["gate/novelty"] == 1.0
    summary = gate.summary()
    assert summary["offered"] == 24 and summary["accepted"] == rows[-1]["gate/accepted_steps"]
    assert int(gate.diagnostic.looks) >= 2


def test_a_second_forward_costs_time_and_changes_nothing(make_trainer) -> None:
    found = []
    for forward in ("single", "double"):
        trainer = make_trainer(
            forward, lora_dropout=0.1, methods=[BackwardGate(**SMALL, burn_in=2, forward=forward)], **ONE
        )
        trainer.train()
        found.append(trained(trainer))
    assert same(*found)


def test_score_layer_stops_the_forward(make_trainer) -> None:
    gate = BackwardGate(**SMALL, burn_in=2, score_layer=0)
    trainer = make_trainer(methods=[gate], **ONE)
    ran = []
    trainer.anatomy.blocks[-1].register_forward_hook(lambda *_: ran.append(1))
    trainer.train()
    assert len(ran) == int(gate.gate.accepted) < 24 == int(gate.gate.offered)


def test_score_layer_at_the_last_block_is_refused(make_trainer) -> None:
    with pytest.raises(ConfigError, match="stopping after its last saves"):
        make_trainer(methods=[BackwardGate(score_layer=99)])


def test_the_last_block_that_a_score_may_follow_is_the_one_before_the_last() -> None:
    model: Any = SimpleNamespace(num_blocks=4)
    BackwardGate(score_layer=2).check_model(model)
    with pytest.raises(ConfigError, match=r"0\.\.2"):
        BackwardGate(score_layer=3).check_model(model)


@pytest.mark.parametrize(
    ("gated", "ungated", "cost", "pays"),
    [
        (0.5, 0.0, 2.0, True),  # it learns where the others learn nothing
        (0.0, 0.0, 0.5, True),  # nobody learns, and it costs less
        (0.0, 0.0, 2.0, False),
        (0.75, 0.5, 1.25, True),  # half more for a quarter more
        (0.75, 0.5, 2.0, False),
    ],
)
def test_a_trial_is_won_by_progress_for_its_seconds(
    gated: float, ungated: float, cost: float, pays: bool
) -> None:
    trial = AutoOff()
    trial.seconds.copy_(torch.tensor([10.0, 10.0 * cost]))
    trial.halves[..., 1] = 4  # four losses in each half
    trial.halves[:, 0, 0] = 4 * 2.0
    trial.halves[:, 1, 0] = 4 * (2.0 - torch.tensor([ungated, gated]))
    assert trial.pays() is pays


def test_a_loss_that_falls_at_an_even_pace_favours_neither_arm_of_the_trial() -> None:
    trial, places = AutoOff(), {True: [], False: []}
    for step in range(200):
        trial.steps.fill_(step)
        places[bool(trial.gated())].append(step)
    assert len(places[True]) == len(places[False]) and sum(places[True]) == sum(places[False])


class WithIds(Collator):
    def __call__(self, rows):
        return {**super().__call__(rows), "example_id": [row["example_id"] for row in rows]}


def test_memory_spares_the_forward_of_what_was_rejected(make_trainer) -> None:
    """One example per batch: what is rejected in epoch 0 is not run in epochs 1 and 2."""
    gate = BackwardGate(**SMALL, burn_in=4, memory=True, target_acceptance=0.4)
    trainer = make_trainer(
        methods=[gate],
        data=make_rows(16),
        arguments={"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "max_steps": 64},
    )
    trainer.data_collator = WithIds(0)
    ran = []
    trainer.anatomy.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    trainer.train()
    spared = int(gate.gate.unforwarded)
    assert spared > 5
    assert len(ran) == 64 - spared
    assert int(gate.gate.offered) == 64


@pytest.mark.parametrize("kind", ["random", "norm"])
def test_token_gate_thins_gradients_and_reports_the_full_loss(make_trainer, kind) -> None:
    gate = BackwardGate(**SMALL, score="token", token_score=kind, burn_in=0, target_acceptance=0.5)
    trainer, plain = make_trainer("t", loss="chunked", methods=[gate]), make_trainer("p", loss="chunked")
    trainer.train()
    plain.train()
    assert losses(trainer)[0] == losses(plain)[0]
    assert not same(trained(trainer), trained(plain))


def test_token_gate_needs_the_chunked_loss(make_trainer) -> None:
    trainer = make_trainer(loss="plain", methods=[BackwardGate(**SMALL, score="token")])
    with pytest.raises(ConfigError, match=r"set training\.loss: chunked"):
        trainer.train()


def test_padding_changes_no_evidence(make_trainer) -> None:
    trainer = make_trainer(methods=[BackwardGate(**SMALL)])
    gate, row = gate_of(trainer), torch.randint(3, 1000, (1, 9))
    labels = row.clone()
    found = []
    for pad in (0, 5):
        batch = {
            "input_ids": torch.nn.functional.pad(row, (0, pad)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(row), (0, pad)),
            "labels": torch.nn.functional.pad(labels, (0, pad), value=-100),
        }
        found.append(gate._evidence_of_sequences(batch).packed())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_sequences_are_selected_from_a_pool_and_packed() -> None:
    """Full batches of accepted rows only, each offered once."""
    gate = BackwardGate(**SMALL, granularity="sequence", burn_in=2, total_steps=40, pool_factor=3)
    model, tokenizer = load_model("random:llama", lora={"dropout": 0.0}, seed=1, device="cpu")
    gate.attach(describe(model))
    rows, collate = make_rows(96), WithIds(tokenizer.pad_token_id)
    batches = [collate([rows[i + j] for j in range(4)]) for i in range(0, 96, 4)]
    packed = list(gate.data_view(batches))
    ids = [i for batch in packed for i in batch["example_id"]]
    assert all(len(batch["labels"]) == 4 for batch in packed)
    assert len(set(ids)) == len(ids)
    assert int(gate.gate.offered) == 96
    assert 0 <= int(gate.gate.accepted) - len(ids) < 4
    original = {str(row["example_id"]): row["input_ids"] for row in rows}
    for batch in packed:
        for example, tokens, mask in zip(
            batch["example_id"], batch["input_ids"], batch["attention_mask"], strict=True
        ):
            assert tokens[mask.bool()].tolist() == original[example]


def test_remembered_rows_are_gathered_into_batches_of_their_own() -> None:
    """Every row comes out once; what was rejected stands in marked batches, as many batches as went in."""
    gate = BackwardGate(d_hidden=4, vocab_size=5, m=16, k=2, memory=True, burn_in=0)
    gate.memory.remember(["1", "2", "5", "6"], epoch=0, accepted=False)
    batches = [{"labels": torch.full((2, 3), i), "example_id": [str(i), str(i + 1)]} for i in range(0, 8, 2)]
    seen = list(gate.data_view(batches, lambda: 1))
    assert [b["example_id"] for b in seen if LEFT_OUT in b] == [["1", "2"], ["5", "6"]]
    assert [b["example_id"] for b in seen if LEFT_OUT not in b] == [["0", "3"], ["4", "7"]]


def test_auto_off_keeps_a_gate_that_pays_and_drops_one_that_does_not() -> None:
    for gated_seconds, off in ((0.5, False), (2.0, True)):
        trial, loss = AutoOff(), 10.0
        while not bool(trial.decided):
            loss -= 0.01
            trial.add(loss, gated_seconds if trial.gated() else 1.0)
        assert int(trial.steps) == 200
        assert bool(trial.off) is off
        assert trial.gated() is not off


def test_auto_off_in_a_run_passes_ungated_batches_through(make_trainer) -> None:
    gate = BackwardGate(**SMALL, burn_in=2, auto_off=True)
    trainer = make_trainer(methods=[gate], arguments={"gradient_accumulation_steps": 1, "max_steps": 60})
    trainer.train()
    assert int(gate.gate.offered) == 60
    assert int(gate.auto_off.steps) == 58


def test_the_diagnostic_sees_a_true_proxy_and_a_false_one() -> None:
    g = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(6, 400, generator=g), dim=1)
    project = torch.randn(400, 256, generator=g)
    found = {}
    for name in ("true", "false"):
        diagnostic = ProxyDiagnostic(256)
        for step in range(120):
            noise = torch.rand((), generator=g) * (step % 3)
            gradient = common[step % 6] + noise * torch.randn(400, generator=g) / 20
            other = common[step % 6] + torch.rand((), generator=g) * 2 * torch.randn(400, generator=g) / 20
            proxy = unit((gradient if name == "true" else other) @ project)
            diagnostic.look(proxy, [gradient[:150].reshape(10, 15), gradient[150:]])
        assert diagnostic.count == 64
        found[name] = diagnostic.correlation()
    assert found["true"] > 0.8
    assert abs(found["false"]) < 0.35


def test_the_diagnostic_is_silent_before_it_has_pairs() -> None:
    assert math.isnan(ProxyDiagnostic(64).correlation()) and ProxyDiagnostic(64).count == 0


def test_a_run_says_of_how_many_pairs_its_diagnostic_is() -> None:
    """A quarter of the sketch's numbers is how many looks come before the first pair."""
    for every, pairs in ((10, 5), (0, 0)):
        gate = BackwardGate(d_hidden=4, vocab_size=5, m=16, k=2, burn_in=0, diagnostic_every=every)
        if gate.diagnostic is not None:
            gate.diagnostic.looks += 4 + 5
        assert gate.summary()["proxy_pairs"] == pairs and gate.summary()["proxy_correlation"] is None


def test_the_diagnostic_sketches_a_gradient_by_multiplicative_hashing() -> None:
    """Knuth's multiplier, 2^32 over the golden ratio, says the bucket of a weight, counted from 1; another one its sign."""
    for place in (0, 1, 6, 12_345):
        diagnostic, gradient = ProxyDiagnostic(64), torch.zeros(20_000)
        gradient[place] = 3.0
        diagnostic.look(torch.zeros(64), [gradient])
        bucket = ((place + 1) * 2654435761 % 2**32) // 2**12 % 64
        sign = 1.0 if (place + 1) * 2246822519 % 2**32 >= 2**31 else -1.0
        assert diagnostic.true_RM[0].nonzero().flatten().tolist() == [bucket]
        assert float(diagnostic.true_RM[0, bucket]) == pytest.approx(sign)


def test_checks_speak_when_the_gate_is_no_better_than_chance(make_trainer, caplog) -> None:
    """A constant stream has no spread of scores."""
    gate = BackwardGate(d_hidden=4, vocab_size=5, m=16, k=2, burn_in=0, center=False, window=64)
    hidden, logits, labels = torch.ones(1, 6, 4), torch.zeros(1, 6, 5), torch.zeros(1, 6, dtype=torch.long)
    for _ in range(310):
        score = gate.score(gate.embed(hidden, logits, labels))
        if gate.accept(score):
            gate.update(gate._pending[0])
    gate._check_once(gate.gate)
    assert any("as a random one" in record.message for record in caplog.records)


def test_it_generates_and_detaches_without_a_trainer() -> None:
    model, _ = load_model("random:llama", lora={"dropout": 0.0}, seed=1, device="cpu")
    ids = torch.randint(3, 100, (1, 5))
    before = model(input_ids=ids).logits
    gate = BackwardGate(**SMALL)
    gate.attach(describe(model))
    assert gate.attached and torch.equal(model(input_ids=ids).logits, before)
    gate.detach()
    assert not gate.attached and torch.equal(model(input_ids=ids).logits, before)
    again = BackwardGate.from_structure(gate.structure())
    again.load_state_dict(gate.state_dict(), strict=True)


def test_a_vote_is_none_in_phases_that_are_not_the_gates() -> None:
    gate = BackwardGate(d_hidden=4, vocab_size=5, m=16, k=2, burn_in=0)
    step = Step(
        batch={}, scheduled=None, global_step=0, micro_step=0, seed=0, max_steps=9, model=torch.nn.Module()
    )
    for phase in ("batch", "partial"):
        step.phase = phase
        assert gate.vote(step) is None


class Drawn(Toy):
    """Accepts micro-batch i of a window with probability p_i, by a pattern; weighs what it accepts by 1 / p_i."""

    chances = (0.25, 0.7)
    weighted = True

    def loss_weight(self, step: Step) -> float:
        return 1 / self.chances[step.window_index] if self.weighted else 1.0

    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        return {}

    @property
    def renormalizes(self) -> bool:
        settings = {"reweight": "ipw"} if self.weighted else {}
        return BackwardGate(**SMALL, **settings).renormalizes


def test_inverse_probability_weights_are_unbiased_over_every_pattern(make_trainer) -> None:
    """sum over patterns of P(pattern) gradient(pattern) = the gradient of the whole window, to rounding."""

    def gradient(pattern: str, weighted: bool) -> dict[str, torch.Tensor]:
        method = Drawn(pattern=pattern)
        method.weighted = weighted
        options = {
            "max_steps": 1,
            "max_grad_norm": 0,
            "optim": "sgd",
            "learning_rate": 1.0,
            "warmup_steps": 0,
        }
        trainer = make_trainer(f"{pattern}{weighted}", methods=[method], arguments=options)
        before = trained(trainer)
        trainer.train()
        return {name: before[name] - after for name, after in trained(trainer).items()}

    whole = gradient("11", False)
    expected = {name: torch.zeros_like(g) for name, g in whole.items()}
    for pattern in ("00", "01", "10", "11"):
        chance = math.prod(p if bit == "1" else 1 - p for p, bit in zip(Drawn.chances, pattern, strict=True))
        for name, g in gradient(pattern, True).items():
            expected[name] += chance * g
    for name in whole:
        torch.testing.assert_close(expected[name], whole[name], atol=2e-6, rtol=1e-4)


def test_what_is_weighted_is_not_renormalized_as_well() -> None:
    assert BackwardGate(**SMALL).renormalizes
    assert not BackwardGate(**SMALL, reweight="ipw").renormalizes
    assert not BackwardGate(**SMALL, score="infobatch").renormalizes
    assert not BackwardGate(**SMALL, renormalize=False).renormalizes
    for options in ({"reweight": "ipw"}, {"score": "infobatch"}):
        with pytest.raises(ConfigError, match="corrects twice"):
            BackwardGate(**SMALL, renormalize=True, **options)


def test_a_schedule_that_ends_early_says_so(make_trainer) -> None:
    trainer = make_trainer(
        methods=[Toy(pattern="0011")], schedule_clock="accepted", arguments={"warmup_steps": 0}
    )
    with pytest.warns(UserWarning, match=r"stands at 6 of 12 steps.*ends at \d+% of the peak"):
        trainer.train()
