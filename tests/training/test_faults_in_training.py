"""Nothing that is not finite is stepped on or saved; a finished run is loaded and not trained; whose loss is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from headgate.errors import CheckpointError, ConfigError, TrainingError
from headgate.files import read_json
from headgate.methods.backward_gate import BackwardGate
from headgate.training import checkpoint
from headgate.training.mixin import MethodsMixin
from headgate.training.saved import load
from headgate.training.trainer import HeadgateTrainer

from .conftest import Toy, trained


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Exploding(Toy):
    """The loss is finite and one gradient is not, at one optimizer step: d sqrt(x) / dx at 0."""

    at = 7

    def losses(self, step: Any) -> dict[str, torch.Tensor]:
        zero = (self.scale - self.scale.detach()).sum()
        return {"toy": torch.sqrt(zero) if step.global_step == self.at else zero}


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_an_infinite_gradient_reaches_no_weight_and_no_checkpoint(
    make_trainer, tmp_path: Path, max_grad_norm: float
) -> None:
    arguments = {"save_steps": 1, "max_grad_norm": max_grad_norm}
    trainer = make_trainer(methods=[Exploding()], arguments=arguments)
    with pytest.raises(TrainingError, match="gradient is not finite at step 7"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trained(trainer).values()), "no step was taken on it"
    rows = read_json(tmp_path / "run" / "nan_batches.json")["batches"]
    assert [row["step"] for row in rows] == [7, 7], "the micro-batches of that step"
    newest = checkpoint.last_valid(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-7"
    again = make_trainer(methods=[Toy()], arguments=arguments)
    again.train(resume_from_checkpoint=str(newest))
    assert again.state.global_step == 12


class Breaking(TrainerCallback):
    """Writes an infinity where no gradient would: into a weight, or into an optimizer moment."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step != 5:
            return
        parameter = next(p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            target = parameter if self.what == "weight" else optimizer.state[parameter]["exp_avg_sq"]
            target.view(-1)[0] = torch.inf


@pytest.mark.parametrize("what", ["weight", "optimizer exp_avg_sq"])
def test_what_is_not_finite_is_never_sealed(make_trainer, tmp_path: Path, what: str) -> None:
    trainer = make_trainer(arguments={"save_steps": 1}, callbacks=[Breaking(what)])
    with pytest.raises(TrainingError, match=f"{what}.*not finite at step 5"):
        trainer.train()
    newest = checkpoint.last_valid(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-4"


def test_a_sealed_checkpoint_with_infinite_weights_is_passed_over(make_trainer, tmp_path: Path) -> None:
    """As an earlier version could have written it."""
    from safetensors.torch import load_file, save_file

    make_trainer(arguments={"save_steps": 5}).train()
    folder = tmp_path / "run" / "checkpoint-10"
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.inf
    save_file(weights, folder / "adapter_model.safetensors")
    checkpoint.seal(folder)
    told: list[str] = []
    newest = checkpoint.last_valid(tmp_path / "run", tell=told.append)
    assert newest is not None and newest.name == "checkpoint-12", "the run's last step is saved too"
    shutil.rmtree(newest)
    newest = checkpoint.last_valid(tmp_path / "run", tell=told.append)
    assert newest is not None and newest.name == "checkpoint-5" and "not finite" in told[0]
    assert "not finite" in str(checkpoint.damage(folder))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_run_at_its_last_step_is_loaded_and_not_trained(
    make_trainer, tmp_path: Path, schedule: str
) -> None:
    arguments = {"max_steps": 8, "save_steps": 8, "lr_scheduler_type": schedule}
    whole = make_trainer("whole", arguments=arguments)
    whole.train()
    again = make_trainer("again", arguments=arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert again.state.global_step == 8 and again.micro_step == whole.micro_step
    assert same(trained(again), trained(whole))


def test_a_run_that_early_stopping_ended_trains_no_more(make_trainer, rows, tmp_path: Path) -> None:
    arguments = {
        "learning_rate": 0.5, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "metric_for_best_model": "eval_loss", "load_best_model_at_end": True,
    }  # fmt: skip

    def made(folder: str) -> Any:
        return make_trainer(
            folder,
            arguments=arguments,
            eval_dataset=rows.select(range(8)),
            callbacks=[EarlyStoppingCallback(1)],
        )

    whole = made("whole")
    whole.train()
    stopped = whole.state.global_step
    assert stopped < 12, "the rate is far too high, so the second validation is worse"
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stopped}"))
    assert again.state.global_step == stopped


def test_a_second_training_begins_anew_after_early_stopping(make_trainer, rows) -> None:
    """Nothing is resumed: the counter that ended the first training does not end the second before its first step."""
    options = {
        "learning_rate": 0.5, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "metric_for_best_model": "eval_loss", "load_best_model_at_end": True,
    }  # fmt: skip
    trainer = make_trainer(
        arguments=options, eval_dataset=rows.select(range(8)), callbacks=[EarlyStoppingCallback(1)]
    )
    trainer.train()
    trainer.train()
    assert trainer.state.global_step > 0


def test_early_stopping_counts_on_after_a_resume(make_trainer, rows, tmp_path: Path) -> None:
    class Counting(EarlyStoppingCallback):
        pass

    options = {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.5,
        "metric_for_best_model": "eval_loss", "load_best_model_at_end": True,
    }  # fmt: skip
    whole = make_trainer(
        "whole", arguments=options, eval_dataset=rows.select(range(8)), callbacks=[Counting(3)]
    )
    whole.train()
    at = whole.state.global_step
    again = make_trainer(
        "again", arguments=options, eval_dataset=rows.select(range(8)), callbacks=[Counting(3)]
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at - 1}"))
    assert again.state.global_step == at


def test_an_edited_file_is_refused_on_every_load(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(methods=[BackwardGate(m=16, k=2, burn_in=1)])
    trainer.base_model = {"name_or_path": "random:llama"}
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    load(tmp_path / "saved")
    description = (tmp_path / "saved" / "headgate.json").read_text()
    assert '"beta": 40.0' in description
    (tmp_path / "saved" / "headgate.json").write_text(description.replace('"beta": 40.0', '"beta": 41.0'))
    with pytest.raises(CheckpointError, match=r"headgate\.json has changed"):
        load(tmp_path / "saved")
    (tmp_path / "saved" / "headgate.json").write_text(description)
    (tmp_path / "saved" / "README.md").write_text("the card is anybody's to edit")
    load(tmp_path / "saved")


class Doubled(Trainer):
    """Trains twice the cross-entropy."""

    calls = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        type(self).calls += 1
        loss = 2 * model(**inputs, num_items_in_batch=num_items_in_batch).loss
        return (loss, None) if return_outputs else loss


class DoubledGated(MethodsMixin, Doubled):
    pass


class OwnObjective(HeadgateTrainer):
    """Overrides above the mixin: a plain subclass of ours."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        return (2 * found[0], found[1]) if isinstance(found, tuple) else 2 * found


@pytest.mark.parametrize("kind", [DoubledGated, OwnObjective])
def test_an_overridden_loss_is_what_is_trained(make_trainer, kind: type) -> None:
    """SGD on twice the loss moves twice as far; transformers' own trainer agrees."""
    options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1e-3, "warmup_steps": 0}
    start = trained(make_trainer("start", kind=Trainer))
    theirs = make_trainer("theirs", kind=Doubled, arguments=options)
    ours = make_trainer("ours", kind=kind, arguments=options)
    plain = make_trainer("plain", arguments=options)
    for trainer in (theirs, ours, plain):
        trainer.train()
    assert same(trained(theirs), trained(ours))
    for name, before in start.items():
        torch.testing.assert_close(
            trained(ours)[name] - before, 2 * (trained(plain)[name] - before), atol=1e-7, rtol=1e-3
        )


def test_compute_loss_func_is_what_is_trained(make_trainer) -> None:
    def doubled(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"][..., :-1, :].flatten(0, 1)
        summed = torch.nn.functional.cross_entropy(
            logits, labels[..., 1:].flatten(), reduction="sum", ignore_index=-100
        )
        return 2 * summed / num_items_in_batch

    theirs = make_trainer("theirs", kind=Trainer, compute_loss_func=doubled)
    ours = make_trainer("ours", compute_loss_func=doubled)
    theirs.train()
    ours.train()
    assert same(trained(theirs), trained(ours))


def test_a_gate_that_reads_the_head_refuses_another_loss(make_trainer) -> None:
    with pytest.raises(ConfigError, match=r"backward_gate reads the head.*Doubled\.compute_loss"):
        make_trainer(kind=DoubledGated, methods=[BackwardGate(m=16, k=2)])


@pytest.mark.parametrize("name", ["DPOTrainer", "RewardTrainer", "KTOTrainer", "GRPOTrainer"])
def test_other_objectives_are_refused_by_name(name: str) -> None:
    import trl

    from headgate.training.objective import objective_override

    kind = type("Mine", (MethodsMixin, getattr(trl, name)), {})
    with pytest.raises(ConfigError, match=f"{name} trains another objective"):
        objective_override(kind.__new__(kind), (MethodsMixin,))


def test_sft_trainer_trains_its_own_loss(tmp_path: Path) -> None:
    """Under the mixin and without it: the same weights, bitwise."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from headgate.models.load import load_model

    rows = Dataset.from_list(
        [{"prompt": f"{i} and {i + 1} are", "completion": f" {2 * i + 1}"} for i in range(16)]
    )

    class Ours(MethodsMixin, SFTTrainer):
        pass

    weights = []
    for kind in (SFTTrainer, Ours):
        model, tokenizer = load_model("embedded", lora={"dropout": 0.0}, seed=1, device="cpu")
        arguments = SFTConfig(
            output_dir=str(tmp_path / kind.__name__), max_steps=3, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], save_strategy="no", learning_rate=1e-2, bf16=False, gradient_checkpointing=False, seed=3,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n})
    assert any(p.abs().max() > 0 for p in weights[0].values())
    assert same(*weights)
