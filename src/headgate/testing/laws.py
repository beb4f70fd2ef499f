"""The laws of a Method by itself. Each is one function of a case; its docstring is the law."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headgate.config import StrictConfig
from headgate.methods.base import Method
from headgate.methods.compose import MethodStack
from headgate.methods.step import Step
from headgate.models.anatomy import describe
from headgate.testing import laws_of_settings as laws_of_settings  # its laws are entered first
from headgate.testing.case import (
    STEPS,
    Case,
    NotApplicable,
    batch_of,
    differing,
    evaluating,
    logits_of,
    losses_of,
    weights_of,
)
from headgate.testing.law import law
from headgate.training.saved import load

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

FLOP_TOLERANCE = 0.05


@law
def detached_is_as_if_never_attached(case: Case) -> None:
    """After ``detach`` the model computes bitwise what it did, and has the parameters that it had."""
    prepared = case.prepared()
    model = prepared.model.eval()
    batch = {
        "input_ids": torch.arange(3, 15).reshape(2, 6),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }
    before, names = logits_of(model, batch), [name for name, _ in model.named_parameters()]
    stack = MethodStack(prepared.methods)
    stack.attach(describe(model))
    stack.eval()
    logits_of(model, batch)
    stack.detach()
    assert torch.equal(logits_of(model, batch), before), "the logits are other ones"
    assert [name for name, _ in model.named_parameters()] == names, "parameters came or went"
    assert not any(method.attached for method in prepared.methods), "a method still says that it is attached"


@law
def neutral_settings_change_no_loss(case: Case) -> None:
    """At its neutral setting, training is bitwise that of the adapter alone."""
    if case.kind.neutral is None:
        raise NotApplicable("the method names no neutral setting")
    neutral = Case(case.name, {**case.options, **case.kind.neutral}, case.folder, case.model)
    trainer = neutral.trained()
    same_loss = {
        "training.loss": trainer.loss_choice
    }  # a method may ask for the chunked one: other last digits
    ours, plain = losses_of(trainer), losses_of(neutral.trained(same_loss, alone=True))
    assert ours == plain, f"losses {ours}, the adapter's alone {plain}"


@law
def what_is_saved_is_what_was_live(case: Case) -> None:
    """The trained model in memory and the saved one, loaded as anybody would, agree bitwise on every logit."""
    trainer = case.trained()
    folder = str(case.folder / f"saved{id(trainer)}")
    trainer.save_model(folder)
    batch = batch_of(trainer)
    with evaluating(trainer) as model:
        live = logits_of(model, batch)
    loaded, _ = load(folder, device="cpu")
    again = logits_of(loaded, batch)
    assert torch.equal(live, again), f"largest difference {float((live - again).abs().max()):.3g}"
    wrong = differing(trainer.methods.state_dict(), loaded.headgate_methods.state_dict())
    assert not wrong, f"state differs: {wrong[:4]}"
    assert trainer.methods.structure() == loaded.headgate_methods.structure(), "structure() differs"


@law
def killed_and_resumed_is_undisturbed(case: Case) -> None:
    """Resumed from any step, a run ends bitwise where the undisturbed one ends; at the last step it trains no more."""
    whole = case.trained()
    for step in (1, STEPS // 2, STEPS):
        again = case.trainer()
        again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        wrong = differing(weights_of(whole), weights_of(again))
        assert not wrong, f"resumed at {step}: {wrong[:4]} differ"
        assert json.dumps(whole.summary(), default=str) == json.dumps(again.summary(), default=str), (
            f"resumed at {step}: the summary is {again.summary()}, was {whole.summary()}"
        )


@law
def a_seed_repeats_a_run(case: Case) -> None:
    """The same recipe twice gives the same weights, bitwise, whatever drew random numbers in between."""
    one = weights_of(case.trained())
    torch.rand(17)
    wrong = differing(one, weights_of(case.trained()))
    assert not wrong, f"{wrong[:4]} differ"


class Companion(Method):
    """Rejects every micro-batch after its forward."""

    name = "conform_rejects_all"

    class Config(StrictConfig):
        """No settings."""

    attach_order = 99

    def vote(self, step: Step) -> Tensor | None:
        return torch.tensor(False) if step.phase == "forward" else None


@law
def a_rejected_batch_moves_nothing(case: Case) -> None:
    """Where another method rejects every batch, no parameter and no optimizer step happens, and the run goes on."""
    trainer = case.trainer()
    if trainer.batches is not None:
        raise NotApplicable("the method forms its own batches")
    before = {name: p.detach().clone() for name, p in trainer.named_trainable.items()}
    trainer.methods.methods = [*trainer.methods.methods, Companion()]
    trainer.train()
    after = {name: p.detach() for name, p in trainer.named_trainable.items() if name in before}
    wrong = differing({name: before[name] for name in after}, after)
    assert not wrong, f"moved: {wrong[:4]}"
    assert float(trainer.trained_tokens) == 0, "rejected tokens are counted as trained"


@law
def groups_cover_what_trains(case: Case) -> None:
    """Every trainable tensor of the method is in exactly one parameter group."""
    trainer = case.trainer()
    for method in trainer.methods:
        grouped = [id(p) for group in method.parameter_groups().values() for p in group]
        assert len(grouped) == len(set(grouped)), f"{method.name}: a tensor is in two groups"
        missing = [
            name for name, p in method.named_parameters() if p.requires_grad and id(p) not in set(grouped)
        ]
        assert not missing, f"{method.name}: in no group: {missing[:4]}"


@law
def a_frozen_group_stays(case: Case) -> None:
    """A group that a stage does not train is bitwise the same after it."""
    if MethodStack(case.prepared().methods).curricula(1e-3):
        raise NotApplicable("the method brings a curriculum of its own")
    groups = [name for method in case.trainer().methods for name in method.parameter_groups()]
    if not groups:
        raise NotApplicable("the method trains nothing of its own")
    rates = {} if case.kind.is_adapter else {"lora": 1e-2}
    if not rates:
        raise NotApplicable("the method is all that trains")
    stages = [
        {"name": "one", "share": 0.5, "train": rates},
        {"name": "two", "share": 0.5, "train": rates | dict.fromkeys(groups, 1e-2)},
    ]
    trainer = case.trainer({"training.stages": stages})
    before = {name: p.detach().clone() for name, p in trainer.methods.named_parameters()}

    from transformers import TrainerCallback

    class Middle(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            if state.global_step == STEPS // 2:
                wrong = differing(before, dict(trainer.methods.named_parameters()))
                assert not wrong, f"trained while frozen: {wrong[:4]}"

    trainer.add_callback(Middle())
    trainer.train()


@law
def padding_changes_nothing(case: Case) -> None:
    """A text among longer ones gives the logits that it gives alone, to rounding."""
    trainer = case.trained()
    ids = torch.arange(5, 25).reshape(1, 20)
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longer = torch.randint(5, 200, (1, 33), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.nn.functional.pad(ids, (0, 13)), longer])
    mask = torch.ones_like(padded)
    mask[0, 20:] = 0
    with evaluating(trainer) as model:
        expected = logits_of(model, alone)[0]
        actual = logits_of(model, {"input_ids": padded, "attention_mask": mask})[0, :20]
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


@law
def cached_generation_is_recomputation(case: Case) -> None:
    """Greedy tokens with a key-value cache are those of computing the whole sequence anew at every token."""
    trainer = case.trained()
    ids = torch.arange(7, 19).reshape(1, 12)
    options: dict[str, object] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with evaluating(trainer) as model, torch.no_grad():
        cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        sequence = ids
        for _ in range(8):
            logits = model(
                input_ids=sequence, attention_mask=torch.ones_like(sequence), use_cache=False
            ).logits
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, sequence), (
        f"{cached[0, 12:].tolist()} with a cache, {sequence[0, 12:].tolist()} without"
    )


@law
def activation_checkpointing_changes_nothing(case: Case) -> None:
    """Losses are the same, to rounding, where activations are computed again in the backward."""
    plain = losses_of(case.trained())
    again = losses_of(case.trained({"model.activation_checkpointing": True}))
    torch.testing.assert_close(torch.tensor(again), torch.tensor(plain), atol=1e-5, rtol=1e-5)


@law
def flops_are_counted(case: Case) -> None:
    """The account of a run's FLOPs, as a multiple of the adapter's alone, is within 5% of what PyTorch counts: what neither
    counts (adapters, norms, the mask of attention, padding) cancels."""
    changes: dict[str, object] = {
        "training.eval_every": 1000,
        "training.save_every": 1000,
        "data.validation": None,
    }
    changes |= {"training.max_steps": 2 * STEPS}
    charged, executed = [], []
    for alone in (False, True):
        trainer = case.trainer(changes, alone=alone)
        changes["training.loss"] = trainer.loss_choice
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        charged.append(float(trainer.flops))
        executed.append(counter.get_total_flops())
    ours, theirs = charged[0] / charged[1], executed[0] / executed[1]
    assert abs(ours / theirs - 1) <= FLOP_TOLERANCE, (
        f"{ours:.3f} of the adapter's run charged, {theirs:.3f} executed"
    )


@law
def telemetry_has_declared_names(case: Case) -> None:
    """Whatever is logged has a name that the trainer or the method declares."""
    from headgate.training.telemetry import is_known

    trainer = case.trained()
    names = {name for row in trainer.state.log_history for name in row if name != "step"}
    unknown = sorted(name for name in names if not is_known(name, trainer.methods.telemetry_names()))
    assert not unknown, f"not declared: {', '.join(unknown[:6])}"
