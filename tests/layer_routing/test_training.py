"""Layer routing in the trainer: every policy trains, the budget holds, nothing is lost by save and load."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from headgate.data.collation import Collator
from headgate.errors import ConfigError
from headgate.experiments.run import quiet
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.layer_routing.inspect import heat_map, measure, token_depth
from headgate.models.load import load_model
from headgate.training.saved import load
from headgate.training.telemetry import is_known
from headgate.training.trainer import HeadgateTrainer

from ..training.arguments import arguments_in
from ..training.conftest import make_rows
from .conftest import batch_of

SMALL: dict[str, Any] = {"keep": 1, "prefix_tokens": 3, "kd_warmup": 2, "router_lr": 1e-2}
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"policy": "dense"},
    "stochastic_depth": {"policy": "stochastic_depth"},
    "truncate": {"policy": "truncate"},
    "static": {"policy": "static"},
    "random": {"policy": "random"},
    "gumbel_sample": {},
    "gumbel_token": {"granularity": "token"},
    "gumbel_sparse": {"granularity": "token", "train_engine": "sparse"},
    "gumbel_penalty": {"budget": "penalty", "units": "attention_mlp"},
    "gumbel_target": {"budget": "target", "entropy_bonus": 0.01, "kd": False},
    "exit": {"policy": "exit", "trunk_gradient": True},
    "reinforce": {"policy": "reinforce", "features": "embedding", "budget": "penalty", "init_keep": 0.5},
    "topk": {"policy": "topk"},
    "gumbel_prepass": {"features": "prepass"},
    "gumbel_drop": {"granularity": "token", "kv": "drop", "kd": False},
    "exit_reuse": {"policy": "exit", "kv": "reuse", "kd": False, "train_engine": "sparse"},
}


def trainer_of(folder: Path, options: dict[str, Any], lora: bool = True, **arguments: Any) -> HeadgateTrainer:
    model, tokenizer = load_model(
        "random:llama", lora={"dropout": 0.0} if lora else None, seed=1, device="cpu"
    )
    trainer = HeadgateTrainer(
        model=model,
        args=arguments_in(
            folder / "out",
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_steps": 3,
                "seed": 3,
                **arguments,
            },
        ),
        train_dataset=make_rows(),
        data_collator=Collator(tokenizer.pad_token_id),
        methods=[LayerRouting(**{**SMALL, **options})],
    )
    quiet(trainer)
    return trainer


def method_of(trainer: Any) -> LayerRouting:
    (method,) = trainer.methods
    return method


def logs_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_trains(tmp_path: Path, name: str) -> None:
    trainer = trainer_of(tmp_path, POLICIES[name])
    method = method_of(trainer)
    before = {n: p.clone() for n, p in method.named_parameters()}
    trainer.train()
    rows = logs_of(trainer)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    unknown = {n for row in rows for n in row if not is_known(n, LayerRouting.telemetry_names)}
    assert unknown <= {"step"}
    moved = {n for n, p in method.named_parameters() if not torch.equal(before[n], p)}
    assert moved == set(before)
    adapter = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert all(float(p.detach().abs().sum()) > 0 for p in adapter) or name in ("truncate", "static")
    if name != "dense":
        assert all(0.25 <= row["routing/utilization"] <= 1 for row in rows)
        executed = [row["routing/executed"] - method.shares.first_forward for row in rows]
        assert all(e == 1 for e in executed) == (method.config.train_engine_for() == "masked")
    if method.config.kd:
        assert ["loss/routing_kd" in row for row in rows] == [False] * 2 + [True] * 4


def test_saved_and_loaded_it_generates_the_same(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"target_utilization": 0.6}, seed=1)
    trainer.base_model = {"name_or_path": "random:llama"}
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    description = json.loads((tmp_path / "saved" / "headgate.json").read_text())
    assert description["methods"]["layer_routing"]["num_blocks"] == 4
    model, _ = load(tmp_path / "saved", device="cpu")
    (method,) = model.headgate_methods
    assert torch.equal(method.budget.threshold, method_of(trainer).budget.threshold)
    assert method.budget.threshold != 0
    batch = batch_of(2, 8)
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
        assert float(method.shares.used(method.route)) < 1
        routed = model(**batch).logits
        method.set_routing("removed")
        assert not torch.equal(model(**batch).logits, routed)
        method.set_routing("on")
        options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
        assert torch.equal(model.generate(**batch, **options), trainer.model.generate(**batch, **options))


@pytest.mark.parametrize("options", [{}, {"patch": {"rank": 4}, "granularity": "token", "init_keep": 0.6}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_is_uninterrupted(tmp_path: Path, options: dict[str, Any], accumulation: int) -> None:
    """Killed between two optimizer steps within an epoch: dual, temperature, patches and router go on bitwise."""
    arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    whole = trainer_of(tmp_path / "a", options, **arguments)
    cut = trainer_of(tmp_path / "b", options, save_steps=3, **arguments)
    whole.train()
    cut.train()
    again = trainer_of(tmp_path / "b", options, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-3"))
    ours, theirs = whole.methods.state_dict(), again.methods.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_budget_that_was_not_reached_is_said(tmp_path: Path) -> None:
    short = {"granularity": "token", "target_utilization": 0.5, "kd": False}
    trainer = trainer_of(tmp_path / "a", {**short, "dual_step": 0.0, "damping": 0.0})
    trainer.train()
    with pytest.warns(
        UserWarning, match=r"asked for .*, not for target_utilization=0.5.*raise dual_step \(0\)"
    ):
        trainer.summary()
    met = trainer_of(tmp_path / "b", {**short, "target_utilization": 0.95})
    met.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        met.summary()


def test_the_budget_is_held(tmp_path: Path) -> None:
    """Utilization on real tokens comes to the target in training; calibrated, within two points on other data."""
    options = {"granularity": "token", "target_utilization": 0.7, "kd": False, "dual_step": 0.05}
    trainer = trainer_of(tmp_path, options, max_steps=100, save_strategy="no", learning_rate=1e-3)
    trainer.train()
    used = [row["routing/utilization"] for row in logs_of(trainer)]
    assert sum(used[-10:]) / 10 == pytest.approx(0.7, abs=0.05)
    method = method_of(trainer)
    held_out = [batch_of(4, 15)]
    method.calibrate(held_out)
    depth = measure(method, held_out)
    assert depth.utilization == pytest.approx(0.7, abs=0.02)
    assert depth.tokens == int(held_out[0]["attention_mask"].sum())
    shares = token_depth(method, held_out[0])
    assert float(shares.nanmean()) == pytest.approx(measure(method, held_out).utilization, abs=1e-5)
    page = heat_map(["<a>", "b"], [0.25, 1.0])
    assert "&lt;a&gt;" in page and "25%" in page


def test_static_finds_the_block_that_costs_least(tmp_path: Path) -> None:
    """Of all masks with one block closed, the one chosen has the least loss on the batches it was chosen on."""
    trainer = trainer_of(tmp_path, {"policy": "static", "target_utilization": 0.75}, max_steps=1)
    method, batch = method_of(trainer), batch_of(4, 12)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    chosen = method.choosing.zero_shot([batch]).tolist()
    losses = {}
    trainer.model.eval()
    for place in range(3):
        method.fixed.fill_(1.0)
        method.fixed[place] = 0.0
        with torch.no_grad():
            losses[place] = float(trainer.model(**batch, use_cache=False).loss)
    assert chosen == [float(place != min(losses, key=losses.__getitem__)) for place in range(3)]
    trainer.train()
    assert sorted(method.fixed.tolist()) == [0.0, 1.0, 1.0]


def test_teacher_is_the_base_model(tmp_path: Path) -> None:
    """With an untrained adapter and open gates, teacher and student agree: KD is zero, and nothing is left changed."""
    trainer = trainer_of(
        tmp_path, {"policy": "gumbel", "kd_warmup": 0, "init_keep": 0.999999, "budget": "none"}, max_steps=1
    )
    required = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert logs_of(trainer)[0]["loss/routing_kd"] == pytest.approx(0, abs=1e-5)
    assert {n: p.requires_grad for n, p in trainer.model.named_parameters()} == required
    assert not method_of(trainer).execution.suspended


def test_a_teacher_without_adapter_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {}, lora=False)
    with pytest.raises(ConfigError, match="kd: false"):
        trainer.train()


def test_it_composes_with_the_other_methods(tmp_path: Path) -> None:
    """A rejecting gate and a bank around routed blocks: all train, and rejected batches move no dual variable."""
    from headgate.methods.backward_gate import BackwardGate
    from headgate.methods.schema_bank import SchemaBank

    trainer = trainer_of(tmp_path, {"granularity": "token"})
    model, arguments, rows = trainer.model, trainer.args, trainer.train_dataset
    trainer.methods.detach()
    routing = LayerRouting(**SMALL, granularity="token")
    bank = SchemaBank(num_schemas=4, rank=2, tags="none", curriculum="joint")
    gate = BackwardGate(target_acceptance=0.5, window=8)
    arguments.max_steps = 12
    both = HeadgateTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(0, ["example_id"]),
        methods=[gate, bank, routing],
    )
    quiet(both)
    both.train()
    accepted = both.trained_tokens
    assert 0 < int(routing.budget.updates) <= 12 and float(accepted) > 0
    assert any("routing/utilization" in row and "gate/score" in row for row in logs_of(both))
