"""How a bank leaves: what is there at each step, who trains, and the loss with and without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headgate.errors import ConfigError
from headgate.methods.schema_bank import SchemaBank
from headgate.methods.schema_bank.config import SchemaBankConfig
from headgate.methods.schema_bank.removal import FADED_AT, Removal
from headgate.methods.schema_bank.tags import hash_pair, text_tags
from headgate.methods.stage import Stage
from headgate.models.anatomy import describe

from .conftest import SMALL, tiny
from .test_training import BANK, LORA, ROUTER, Snapshots, moved

STEPS = 200


def scales(removal: str, seed: int = 0, removing: bool = True) -> list[float]:
    found = Removal(SchemaBankConfig(removal=removal))
    stage = Stage(name="joint", share=1.0, train={"lora": 1.0}, options={"removing": removing})
    made = []
    for step in range(STEPS):
        found.begin(
            SimpleNamespace(stage=stage, stage_step=step, stage_steps=STEPS, global_step=step, seed=seed)
        )
        made.append(found.scale)
    return made


def test_a_fading_bank_goes_from_whole_to_nothing_before_the_end() -> None:
    path = scales("fade")
    assert path[0] == 1 and path == sorted(path, reverse=True)
    assert all(scale == 0 for scale in path[int(FADED_AT * STEPS) :]) and path[int(FADED_AT * STEPS) - 2] > 0


def test_dropout_takes_half_of_the_steps_and_never_the_first() -> None:
    path = scales("dropout")
    assert path[0] == 1 and set(path) == {0.0, 1.0}
    assert abs(sum(path) / STEPS - 0.5) < 4 * (0.25 / STEPS) ** 0.5
    assert path == scales("dropout"), "a function of seed and step: the same on every rank and after a resume"
    assert path != scales("dropout", seed=1)


@pytest.mark.parametrize("removal", ["abrupt", "fade", "dropout", "distil"])
def test_before_the_last_stage_the_bank_is_whole(removal) -> None:
    assert set(scales(removal, removing=False)) == {1.0}
    stages = SchemaBankConfig(removal=removal).stages(1e-3)
    assert [bool(s.options.get("removing")) for s in stages] == [False, False, removal != "abrupt"]


@pytest.mark.parametrize("combine", ["add", "replace"])
def test_at_its_ends_a_scaled_bank_is_the_kept_and_the_removed_one(combine) -> None:
    model, _ = tiny()
    bank = SchemaBank(**SMALL, removal="fade", combine=combine)
    bank.attach(describe(model))
    model.train()
    ids = torch.randint(3, 100, (2, 7))

    def logits(scale: float, routing: str | None = None) -> torch.Tensor:
        bank.removal.scale = scale
        if routing is None:
            return model(input_ids=ids).logits.detach()
        with bank.removal.forced(routing):
            return model(input_ids=ids).logits.detach()

    on, removed = logits(1.0, "on"), logits(1.0, "removed")
    assert not torch.allclose(on, removed)
    assert torch.equal(logits(1.0), on) and torch.equal(logits(0.0), removed)
    half = logits(0.5)
    assert not torch.allclose(half, on) and not torch.allclose(half, removed)
    torch.testing.assert_close(logits(1 - 1e-6), on, atol=1e-4, rtol=1e-4)


def test_under_distillation_the_bank_teaches_and_only_the_lora_learns(make_trainer) -> None:
    trainer = make_trainer(method=SchemaBank(**SMALL, removal="distil"), arguments={"max_steps": 8})
    snapshots = Snapshots()
    snapshots.trainer = trainer
    trainer.add_callback(snapshots)
    trainer.train()
    before, after = snapshots.states[6], snapshots.states[8]
    assert moved(before, after) and all(LORA in name for name in moved(before, after))
    assert any(BANK in name for name in before) and any(ROUTER in name for name in before)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all("loss/schema_distil" not in row for row in rows[:6])
    assert all(row["loss/schema_distil"] > 0 and row["schema/bank/scale"] == 0 for row in rows[6:])


@torch.no_grad()
def test_a_bank_that_adds_nothing_has_nothing_to_teach() -> None:
    model, _ = tiny()
    bank = SchemaBank(**SMALL, removal="distil", init_std=0.0)
    anatomy = describe(model)
    bank.attach(anatomy)
    model.eval()
    ids = torch.randint(3, 100, (2, 7))
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    step = SimpleNamespace(hidden=hidden, batch={"input_ids": ids}, labels=ids)
    assert float(bank.removal.distillation(anatomy, step)) == pytest.approx(0, abs=1e-6)
    for layer in bank.layers.values():
        for parameter in layer.bank_parameters():
            parameter.normal_(0, 0.3)
    assert float(bank.removal.distillation(anatomy, step)) > 1e-4


@pytest.mark.parametrize("removal", ["fade", "dropout"])
def test_a_bank_that_leaves_trains_and_resumes_like_any_other(make_trainer, removal) -> None:
    trainer = make_trainer(method=SchemaBank(**SMALL, removal=removal), arguments={"max_steps": 16})
    snapshots = Snapshots()
    snapshots.trainer = trainer
    trainer.add_callback(snapshots)
    trainer.train()
    last = moved(snapshots.states[12], snapshots.states[16])
    assert {kind for kind in (LORA, BANK, ROUTER) if any(kind in name for name in last)} == {
        LORA,
        BANK,
        ROUTER,
    }


def test_validation_says_what_the_bank_is_worth(make_trainer) -> None:
    from .conftest import tagged_rows

    trainer = make_trainer(
        eval_dataset=tagged_rows(12, seed=9), arguments={"eval_strategy": "steps", "eval_steps": 4}
    )
    trainer.train()
    bank = trainer.methods.by_name["schema_bank"]
    reported = bank.summary()["bank_validation"]
    for name, routing in (("with", "on"), ("without", "removed")):
        bank.set_routing(routing)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(reported[name], rel=1e-5)
    assert reported["with"] != reported["without"]
    assert any("schema/bank/loss_with" in row for row in trainer.state.log_history)


def test_the_released_pair_is_sorted_and_its_number_is_its_own() -> None:
    pairs = [hash_pair(f"text {i}", 32) for i in range(200)]
    assert all(pair == sorted(pair) for pair in pairs)
    assert any(a != b for a, b in pairs)
    assert all(len(text_tags("hash_pair", f"text {i}", 32, 2, 0)) == 2 for i in range(20))
    assert SchemaBankConfig(preset="released").tags_per_example == 2
    assert SchemaBankConfig(tags="hash_pair").tags_per_example == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": "hash_pair", "tags_per_example": 3}, "hash_pair gives two tags"),
        ({"tags": "keyword", "tags_per_example": 5}, "exceeds the 4 schemas of a keyword class"),
        ({"removal": "fade", "eval_routing": "on"}, "a life without its bank"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SchemaBank(**options)
