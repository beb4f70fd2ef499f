"""A saved run as teacher: what it teaches, and that nothing of it stays in the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headgate.errors import ConfigError, ModelError
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.layer_routing.teacher import read_teacher
from headgate.models.anatomy import describe
from headgate.models.load import load_adapter, load_model

from .conftest import batch_of
from .test_training import logs_of, method_of, trainer_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of a run whose adapter is not zero, with a rank and targets of its own."""
    folder = tmp_path / "run" / "checkpoint"
    adapter = {
        "r": 3,
        "alpha": 5,
        "target_modules": ["q_proj", "down_proj"],
        "dropout": 0.0,
        "use_rslora": True,
    }
    model, _ = load_model("random:llama", lora=adapter, seed=1, device="cpu")
    stream = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=stream) * 0.3)
    model.save_pretrained(folder)
    (folder / "headgate.json").write_text(json.dumps({"methods": {"layer_routing": {}}}))
    return folder.parent


def test_it_computes_what_peft_computes(saved: Path) -> None:
    """The same logits as PEFT's own loading of the adapter on the bare base; afterwards the student, bitwise."""
    batch = batch_of()
    base, _ = load_model("random:llama", seed=1, device="cpu")
    expected = load_adapter(base, str(saved / "checkpoint")).eval()(**batch).logits
    student, _ = load_model("random:llama", lora={"dropout": 0.0}, seed=1, device="cpu")
    before = student.eval()(**batch).logits
    teacher, anatomy = read_teacher(f"run:{saved}"), describe(student)
    teacher.check(anatomy)
    with student.disable_adapter(), teacher.applied(anatomy.model):
        torch.testing.assert_close(student(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(student(**batch).logits, before)


def test_a_run_teaches_and_leaves_nothing(tmp_path: Path, saved: Path) -> None:
    """KD differs from the base's; trainable parameters, saved files and the detached model are as with ``base``."""
    runs: dict[str, Any] = {}
    for teacher in ("base", f"run:{saved}"):
        options = {"kd_warmup": 0, "teacher": teacher, "init_keep": 0.999999, "budget": "none"}
        trainer = trainer_of(tmp_path / teacher[:4], options, max_steps=2)
        names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        trainer.save_model(str(tmp_path / teacher[:4] / "saved"))
        runs[teacher] = trainer, names, logs_of(trainer)[0]["loss/routing_kd"]
        assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == names
    (_, base_names, base_kd), (run, names, kd) = runs.values()
    assert base_names == names and base_kd == pytest.approx(0, abs=1e-5) and kd > 1e-3
    folders = [tmp_path / name / "saved" for name in ("base", "run:")]
    for file in ("adapter_model.safetensors", "headgate.safetensors"):
        first, second = (load_file(folder / file) for folder in folders)
        assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
    configs = [(folder / "adapter_config.json").read_text() for folder in folders]
    assert configs[0] == configs[1]
    assert {p.name for p in folders[0].iterdir()} == {p.name for p in folders[1].iterdir()}
    model = run.model.eval()
    run.detach_methods()
    fresh, _ = load_model("random:llama", seed=1, device="cpu")
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch_of()).logits, fresh(**batch_of()).logits)


def test_the_loss_is_against_the_teachers_logits(tmp_path: Path, saved: Path) -> None:
    """T^2 KL(teacher || student) of the two models' whole logit tables, written out."""
    trainer = trainer_of(tmp_path, {"kd_warmup": 0, "teacher": f"run:{saved}", "kd_temperature": 2.0})
    method, seen = method_of(trainer), {}

    def look(step: Any) -> Any:
        loss = method.teacher.loss(trainer.anatomy, step, method.execution.paused())
        seen.update(loss=float(loss.detach()), hidden=step.hidden.detach().clone(), batch=step.batch)
        return {}

    method.losses = look
    trainer.args.max_steps = 1
    head = trainer.anatomy.head
    trainer.train()
    base, _ = load_model("random:llama", seed=1, device="cpu")
    inputs = {k: seen["batch"][k] for k in ("input_ids", "attention_mask") if k in seen["batch"]}
    with torch.no_grad():
        teacher = load_adapter(base, str(saved / "checkpoint")).eval()(**inputs).logits / 2
        student = head(seen["hidden"]) / 2
    labelled = seen["batch"]["labels"][:, 1:] != -100
    p, q = (x[:, :-1][labelled].log_softmax(-1) for x in (teacher, student))
    assert seen["loss"] == pytest.approx(float(4 * (p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_what_cannot_teach_is_refused(tmp_path: Path, saved: Path) -> None:
    llama = describe(load_model("random:llama", seed=1, device="cpu")[0])
    with pytest.raises(ConfigError, match=r"teacher=exp1: give base, or run:<path"):
        LayerRouting(teacher="exp1")
    with pytest.raises(ConfigError, match="the folder does not exist"):
        read_teacher("run:nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        read_teacher(f"run:{tmp_path / 'empty'}")
    for options, message in (
        ({"target_modules": ["q_proj"], "use_dora": True}, "more than plain LoRA.*use_dora"),
        (
            {"peft_type": "ia3", "target_modules": ["q_proj"], "feedforward_modules": []},
            "more than plain LoRA",
        ),
    ):
        other, _ = load_model("random:llama", lora=options, seed=1, device="cpu")
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ModelError, match=message):
            read_teacher(f"run:{tmp_path / 'other'}")
    wide, _ = load_model("random:gpt2", lora={}, seed=1, device="cpu")
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match="which this model does not have"):
        read_teacher(f"run:{tmp_path / 'wide'}").check(llama)
    teacher = read_teacher(f"run:{saved}")
    teacher.pairs = {path: (torch.zeros(3, 32), b) for path, (_, b) in teacher.pairs.items()}
    with pytest.raises(ModelError, match="made for another base"):
        teacher.check(llama)
    (saved / "checkpoint" / "headgate.json").write_text(json.dumps({"methods": {"schema_bank": {}}}))
    with pytest.raises(ConfigError, match=r"more than its LoRA adapter \(schema_bank\)"):
        read_teacher(f"run:{saved}")
    trainer = trainer_of(tmp_path, {"teacher": "run:nowhere"})
    with pytest.raises(ConfigError, match="the folder does not exist"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ConfigError, match="teaches nothing without kd"):
        trainer_of(tmp_path, {"teacher": "run:nowhere", "kd": False})
