"""The three stages in the trainer: what moves, exact resume, the exported adapter."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from headgate.errors import ConfigError, DataError
from headgate.methods.schema_bank import SchemaBank
from headgate.models.load import load_model
from headgate.training.saved import load
from headgate.training.telemetry import is_known

from .conftest import SMALL, state_of
from .test_method import forward, rows

LORA, ROUTER, BANK, LOAD = "lora_", ".router.", ".bank.", "load_average"


class Snapshots(TrainerCallback):
    """The whole state before training and after each optimizer step."""

    def __init__(self) -> None:
        self.trainer, self.states = None, []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.states.append(state_of(self.trainer))

    on_step_end = on_train_begin


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_each_stage_moves_exactly_what_it_declares(make_trainer) -> None:
    trainer, snapshots = make_trainer(), Snapshots()
    snapshots.trainer = trainer
    trainer.add_callback(snapshots)
    trainer.train()
    everything = set(snapshots.states[0])
    kinds = {kind: {n for n in everything if kind in n} for kind in (LORA, ROUTER, BANK, LOAD)}
    assert len(kinds[ROUTER]) == 2 and len(kinds[BANK]) == 4
    start, one, two, three = (snapshots.states[i] for i in (0, 2, 6, 8))
    assert moved(start, one) == kinds[ROUTER] | kinds[LOAD]
    assert moved(one, two) == kinds[BANK] | kinds[LORA] | kinds[LOAD]
    assert moved(two, three) == kinds[ROUTER] | kinds[BANK] | kinds[LORA] | kinds[LOAD]
    rows_logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["stage"] for row in rows_logged] == ["router"] * 2 + ["schemas"] * 4 + ["joint"] * 2
    assert {n for row in rows_logged for n in row if not is_known(n, SchemaBank.telemetry_names)} <= {"step"}
    assert all("loss/schema_tag" in row for row in rows_logged[:2])
    assert all("loss/schema_orth" in row and "loss/schema_tag" not in row for row in rows_logged[2:])
    assert all(f"schema/{block}/tag_alignment" in row for row in rows_logged for block in (2, 3))


@pytest.mark.parametrize(
    ("options", "still"),
    [({"bank": "frozen"}, BANK), ({"router": "frozen"}, ROUTER), ({"router": "uniform"}, ROUTER)],
)
def test_controls_train_without_what_they_freeze(make_trainer, options: dict[str, str], still: str) -> None:
    trainer = make_trainer(method=SchemaBank(**SMALL, **options))
    before = state_of(trainer)
    trainer.train()
    changed = moved(before, state_of(trainer))
    assert not any(still in name for name in changed)
    assert any(LORA in name for name in changed)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_presets_train(make_trainer, preset: str) -> None:
    trainer = make_trainer(method=SchemaBank(preset=preset, **SMALL))
    before = state_of(trainer)
    trainer.train()
    changed = moved(before, state_of(trainer))
    assert all(any(kind in name for name in changed) for kind in (LORA, ROUTER, BANK))
    assert preset == "paper" or not any("attribute" in name for name in changed)


@pytest.mark.parametrize("at", [1, 2, 4, 6, 7])
def test_resume_in_the_middle_of_any_stage_is_bitwise(make_trainer, tmp_path: Path, at: int) -> None:
    saving = {"save_strategy": "steps", "save_steps": at}
    whole = make_trainer("whole", arguments=saving)
    whole.train()
    again = make_trainer("again", arguments=saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert moved(state_of(whole), state_of(again)) == set()


def test_the_export_is_a_plain_adapter_with_the_bank_beside_it(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(arguments={"learning_rate": 0.05})
    trainer.train()
    batch = rows([5, 9])
    trainer.model.eval()
    (method,) = trainer.methods
    removed = forward(trainer.model, batch).logits
    method.set_routing("on")
    on = forward(trainer.model, batch).logits
    assert not torch.allclose(on, removed)
    trainer.save_model(str(tmp_path / "out"))
    base, _ = load_model("random:llama", lora=None, seed=1, device="cpu")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert torch.equal(forward(plain, batch).logits, removed)
    again, _ = load(tmp_path / "out", name_or_path="random:llama")
    (method,) = again.headgate_methods
    assert torch.equal(method.layers["2"].bank.up, trainer.methods.methods[0].layers["2"].bank.up)


def test_stages_can_be_given_in_steps(make_trainer) -> None:
    trainer = make_trainer(method=SchemaBank(**SMALL, stage_steps=[1, 3, 4]))
    trainer.train()
    stages = [row["stage"] for row in trainer.state.log_history if "loss" in row]
    assert [len(list(group)) for _, group in itertools.groupby(stages)] == [1, 3, 4]
    with pytest.raises(ConfigError, match="steps"):
        make_trainer("wrong", method=SchemaBank(**SMALL, stage_steps=[1, 3, 5])).train()


def test_a_batch_without_tags_is_refused_by_name(make_trainer) -> None:
    trainer = make_trainer()
    trainer.train_dataset = trainer.train_dataset.remove_columns("tags")
    with pytest.raises((DataError, ConfigError), match="tags"):
        trainer.train()
