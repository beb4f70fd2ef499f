"""Laws of the trainer: parity with transformers, exact resume, stages, gating inside a window, checks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from headgate.errors import CheckpointError, ConfigError, TrainingError
from headgate.methods.stage import Stage
from headgate.training import checkpoint
from headgate.training.telemetry import is_known

from .conftest import Toy, make_rows, same, trained


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_without_methods_it_is_transformers_trainer_bitwise(make_trainer) -> None:
    plain, ours = make_trainer("plain", kind=Trainer), make_trainer("ours")
    plain.train()
    ours.train()
    assert losses(plain) == losses(ours)
    assert same(trained(plain), trained(ours))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resume_equals_uninterrupted_bitwise(make_trainer, tmp_path: Path, dropout: float) -> None:
    whole = make_trainer("whole", lora_dropout=dropout, methods=[Toy()])
    whole.train()
    for at in (5, 10):
        again = make_trainer("again", lora_dropout=dropout, methods=[Toy()])
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert same(trained(again), trained(whole)), f"resume at {at}"
        assert again.methods.methods[0].seen == whole.methods.methods[0].seen


STAGES = [
    Stage(name="one", share=0.25, train={"scale": 1e-2}),
    Stage(name="two", share=0.5, train={"lora": 1e-2}, warmup=0.5),
    Stage(name="three", share=0.25, train={"lora": 1e-3, "scale": 1e-3}),
]


def test_each_stage_moves_exactly_its_groups(make_trainer) -> None:
    """Parameters after n stages, compared bitwise with those after n-1."""
    after = [trained(make_trainer("none", methods=[Toy()], stages=STAGES))]
    for count in (1, 2, 3):
        trainer = make_trainer(f"s{count}", methods=[Toy()], stages=STAGES)
        stop = [3, 9, 12][count - 1]

        class Stop(_Stopper):
            at = stop

        trainer.add_callback(Stop())
        trainer.train()
        after.append(trained(trainer))
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(after)]
    everything = set(after[0])
    lora = {n for n in everything if "lora" in n}
    assert moved[0] == everything - lora
    assert moved[1] == lora
    assert moved[2] == everything


class _Stopper(__import__("transformers").TrainerCallback):
    at = 0

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.at


@pytest.mark.parametrize("at", [2, 3, 4, 9, 11])
def test_resume_inside_and_at_the_edges_of_stages(make_trainer, tmp_path: Path, at: int) -> None:
    options = dict(methods=[Toy()], stages=STAGES, arguments={"save_steps": 1})
    whole = make_trainer("whole", **options)
    whole.train()
    again = make_trainer("again", methods=[Toy()], stages=STAGES, arguments={"save_steps": 1})
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert same(trained(again), trained(whole))


def test_learning_rates_follow_each_stage(make_trainer) -> None:
    trainer = make_trainer(methods=[Toy()], stages=STAGES)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["stage"] for row in rows] == ["one"] * 3 + ["two"] * 6 + ["three"] * 3
    peaks = {
        s: max(r.get("learning_rate/lora", 0) for r in rows if r["stage"] == s)
        for s in ("one", "two", "three")
    }
    assert peaks["one"] == 0 and peaks["two"] == pytest.approx(1e-2) and peaks["three"] == pytest.approx(1e-3)
    unknown = {
        name for row in rows for name in row if not is_known(name, Toy.telemetry_names) and name != "step"
    }
    assert not unknown, f"telemetry outside the fixed names: {unknown}"


def test_a_group_without_a_stage_is_an_error(make_trainer) -> None:
    trainer = make_trainer(methods=[Toy()], stages=[Stage(name="only", share=1.0, train={"lora": 1e-3})])
    with pytest.raises(ConfigError, match="'scale' is trained by no stage"):
        trainer.train()
    trainer = make_trainer(
        methods=[Toy()], stages=[Stage(name="only", share=1.0, train={"lora": 1e-3, "scal": 1})]
    )
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        trainer.train()


@pytest.mark.parametrize("pattern", ["01", "10", "0110", "1000"])
def test_partly_accepted_windows_equal_training_on_what_was_accepted(make_trainer, pattern: str) -> None:
    """The gradient of a window is the mean over its accepted tokens, as if the rest had never been offered."""
    trainer = make_trainer(methods=[Toy(pattern=pattern)], arguments={"max_steps": 1, "max_grad_norm": 0})
    seen = []

    class Keep(__import__("transformers").TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            seen.append({n: p.grad.clone() for n, p in trainer.named_trainable.items() if p.grad is not None})

    trainer.add_callback(Keep())
    batches = list(itertools.islice(iter(trainer.get_train_dataloader()), 2))
    trainer.train()
    accepted = [batch for batch, bit in zip(batches, pattern * 2, strict=False) if bit == "1"]
    if not accepted:
        assert seen == [{}]
        return
    reference = make_trainer("reference", methods=[Toy()])
    model = reference.model.train()
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in accepted)
    for batch in accepted:
        inputs = reference.model_inputs(batch)
        model(**inputs, num_items_in_batch=torch.tensor(tokens)).loss.backward()
    for name, parameter in reference.named_trainable.items():
        if name != next(iter(dict(reference.methods.named_parameters()))):
            assert torch.allclose(seen[0][name], parameter.grad, atol=1e-6), name


def test_a_wholly_rejected_run_changes_nothing(make_trainer) -> None:
    trainer = make_trainer(methods=[Toy(pattern="0")], schedule_clock="accepted")
    before = trained(trainer)
    trainer.train()
    assert same(before, trained(trainer))
    assert trainer.trained_tokens == 0 and not losses(trainer)
    assert trainer.lr_scheduler.inner.last_epoch == 0


def test_the_schedule_clock(make_trainer) -> None:
    offered = make_trainer("o", methods=[Toy(pattern="0011")], schedule_clock="offered")
    accepted = make_trainer("a", methods=[Toy(pattern="0011")], schedule_clock="accepted")
    offered.train()
    accepted.train()
    assert offered.lr_scheduler.inner.last_epoch == 12
    assert accepted.lr_scheduler.inner.last_epoch == 6


def test_rejection_touches_neither_data_order_nor_random_draws(make_trainer) -> None:
    """The losses offered at step 1 are the same, whatever is decided about them."""
    first = []
    for pattern in ("1", "0"):
        trainer = make_trainer(
            pattern, lora_dropout=0.1, methods=[Toy(pattern=pattern)], arguments={"max_steps": 1}
        )
        trainer.train()
        first.append(next(row["loss_all"] for row in trainer.state.log_history if "loss_all" in row))
    assert first[0] == first[1]


def test_missing_gradient_is_named(make_trainer) -> None:
    class Idle(Toy):
        def attach(self, anatomy) -> None:
            pass

        def losses(self, step):
            return {}

    with pytest.raises(TrainingError, match=r"no gradient reached .*scale"):
        make_trainer(methods=[Idle()]).train()


def test_nan_loss_stops_with_the_batch_ids(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(arguments={"learning_rate": 1e-3})
    with torch.no_grad():
        trainer.anatomy.final_norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite at step 0"):
        trainer.train()
    assert json.loads((tmp_path / "run" / "nan_batches.json").read_text())


def test_damaged_checkpoints_are_named_and_never_resumed_from(make_trainer, tmp_path: Path) -> None:
    make_trainer().train()
    run = tmp_path / "run"
    newest, older = checkpoint.checkpoints(run)[:2]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7] + b"garbage")
    with pytest.raises(CheckpointError, match=r"corrupted: adapter_model.safetensors"):
        make_trainer().train(resume_from_checkpoint=str(newest))
    told: list[str] = []
    assert checkpoint.last_valid(run, tell=told.append) == older
    assert "adapter_model.safetensors" in told[0]
    (older / checkpoint.MANIFEST).unlink()
    assert checkpoint.last_valid(run) is None or checkpoint.last_valid(run) not in (newest, older)


def test_checkpoint_of_other_methods_is_refused(make_trainer, tmp_path: Path) -> None:
    make_trainer(methods=[Toy()]).train()
    with pytest.raises(CheckpointError, match=r"saved with methods \['toy'\]"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))


def test_streams_read_stage_after_stage(make_trainer) -> None:
    """Each stage reads its own data set only, round and round, and resume lands in the right place."""
    data = {"a": make_rows(10, seed=1), "b": make_rows(6, seed=2)}
    stages = [
        Stage(name="a", steps=3, train={"lora": 1e-2}, data="a"),
        Stage(name="b", steps=2, train={"lora": 1e-2}, data="b"),
        Stage(name="a again", steps=2, train={"lora": 1e-2}, data="a"),
    ]
    trainer = make_trainer(data=data, stages=stages, arguments={"max_steps": 7})
    order = list(trainer._get_train_sampler())
    assert len(order) == 7 * 8
    assert (
        set(order[:24]) == set(range(10))
        and set(order[24:40]) == set(range(10, 16))
        and set(order[40:]) <= set(range(10))
    )
    trainer.train()


def test_validation_loss_does_not_depend_on_the_batch_size(make_trainer, rows) -> None:
    found = []
    for size in (1, 3, 16):
        trainer = make_trainer(f"b{size}", arguments={"per_device_eval_batch_size": size}, eval_dataset=rows)
        found.append(trainer.evaluate()["eval_loss"])
    assert max(found) - min(found) < 1e-5


def test_a_save_cut_short_leaves_the_checkpoint_before_it(make_trainer, tmp_path: Path, monkeypatch) -> None:
    real, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="No space left"):
        make_trainer().train()
    monkeypatch.undo()
    assert checkpoint.last_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-5"
    whole, again = make_trainer("whole"), make_trainer("run")
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert same(trained(whole), trained(again))


def test_deepspeed_is_refused() -> None:
    from types import SimpleNamespace

    from headgate.training.replicas import take_over_reduction

    with pytest.raises(ConfigError, match="DeepSpeed steps its optimizer inside backward"):
        take_over_reduction(SimpleNamespace(distributed_type="DistributedType.DEEPSPEED"))


def test_chunked_and_plain_loss_agree(make_trainer) -> None:
    """The losses of a run agree, and so do the gradients of its first step."""
    gradients: list[dict] = []
    trainers = [make_trainer(loss, loss=loss) for loss in ("plain", "chunked")]
    for trainer in trainers:

        class Keep(__import__("transformers").TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, of=trainer, **_):
                if state.global_step == 0:
                    gradients.append({n: p.grad.clone() for n, p in of.named_trainable.items()})

        trainer.add_callback(Keep())
        trainer.train()
    assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), abs=2e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_label_smoothing_is_shifted_like_the_loss(make_trainer) -> None:
    """The smoothed loss equals torch's own on shifted labels."""
    trainer = make_trainer(label_smoothing=0.1, arguments={"max_steps": 1, "gradient_accumulation_steps": 1})
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.model(**{k: v for k, v in trainer.model_inputs(batch).items() if k != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], label_smoothing=0.1
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(float(expected), abs=1e-5)


def test_activation_checkpointing_changes_nothing(make_trainer) -> None:
    plain, checkpointed = make_trainer("p", methods=[Toy()]), make_trainer("c", methods=[Toy()])
    checkpointed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain.train()
    checkpointed.train()
    assert losses(plain) == losses(checkpointed)
    assert same(trained(plain), trained(checkpointed))


def test_packed_rows_equal_padded_rows(make_trainer) -> None:
    """The loss of packed documents is that of the same documents, padded, one a row."""
    from headgate.data.packing import pack

    rows = make_rows(12, seed=4)
    packed = pack([dict(row) for row in rows], 64)
    padded = make_trainer("padded", eval_dataset=rows).evaluate()["eval_loss"]
    # the first token of a packed document must not be predicted from the document before it
    assert make_trainer("packed", eval_dataset=packed).evaluate()["eval_loss"] == pytest.approx(
        padded, abs=1e-5
    )
