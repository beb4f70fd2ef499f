"""What a recipe says of precision, optimizer and schedule is what runs, and what this machine cannot do is refused first."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import OptimizerNames

from headgate.errors import ConfigError
from headgate.experiments.recipe_file import recipe_from
from headgate.testing.case import Case, losses_of
from headgate.training.precision import ARGUMENTS, LAUNCHER, OPTIM, Scheduler, check_machine


def recipe(**training: Any) -> Any:
    return recipe_from({"training": training}, "a test")


def trained(folder: Path, **changes: Any) -> Any:
    return Case("schema_bank", {}, folder).trained(
        {f"training.{k}": v for k, v in changes.items()}, alone=True
    )


def test_the_tables_are_those_of_transformers() -> None:
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    theirs = {kind.value: make for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items()}
    for name in get_args(Scheduler):
        assert set(inspect.signature(theirs[name]).parameters) - given == set(ARGUMENTS.get(name, ())), name
    assert set(OPTIM.values()) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optimizer": "adam"}, "training.optimizer: .*did you mean 'adamw'"),
        (
            {"precision": "bfloat16"},
            "training.precision: did you mean 'bf16'\\? choose one of auto, fp32, bf16, fp16",
        ),
        ({"lr_scheduler": "cosin"}, "training.lr_scheduler: .*did you mean 'cosine'"),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_args": {"min_lr": 0}},
            "lr_scheduler_args.min_lr: cosine has no",
        ),
        ({"lr_scheduler_args": {"power": 2}}, "linear has no such argument: it takes none"),
        ({"betas": [0.9, 1.0]}, "training.betas.1: should be less than 1"),
        ({"per_device_eval_batch_size": 0}, "training.per_device_eval_batch_size: "),
        ({"adam_beta2": 0.95}, "training.betas"),
    ],
)
def test_a_wrong_choice_is_refused_when_the_recipe_is_read(training: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe(**training)


def test_new_keys_at_their_defaults_change_no_id() -> None:
    plain = recipe()
    spelled = recipe(
        precision="auto", optimizer="adamw", betas=[0.9, 0.999], epsilon=1e-8, lr_scheduler_args={},
        dataloader_workers=0, per_device_eval_batch_size=None,
    )  # fmt: skip
    assert spelled.run_id() == plain.run_id() != recipe(betas=[0.9, 0.95]).run_id()


def test_fp32_loads_the_base_so_and_contradicts_another_dtype() -> None:
    assert (
        recipe(precision="fp32").model.dtype == "float32" and recipe(precision="bf16").model.dtype == "auto"
    )
    with pytest.raises(ConfigError, match=r"precision=fp32 and model\.dtype=bfloat16 contradict"):
        recipe_from({"model": {"dtype": "bfloat16"}, "training": {"precision": "fp32"}}, "a test")


@pytest.mark.parametrize(
    ("precision", "optimizer", "words"),
    [
        ("fp16", "adamw", "precision=fp16 runs on a GPU"),
        ("auto", "paged_adamw_8bit", "optimizer=paged_adamw_8bit runs on a GPU"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_before_anything_is_loaded(
    precision: str, optimizer: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_machine(precision, optimizer, torch.device("cpu"))
    case = Case("schema_bank", {}, tmp_path, model="random:no_such_shape")
    with pytest.raises(ConfigError, match=words):
        case.prepared({"training.precision": precision, "training.optimizer": optimizer}, alone=True)


def test_the_recipe_decides_the_precision_and_not_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER, "no")
    plain = losses_of(trained(tmp_path))
    half = losses_of(trained(tmp_path, precision="bf16"))
    assert half != plain and half == pytest.approx(plain, rel=0.02)
    monkeypatch.setenv(LAUNCHER, "bf16")
    with pytest.warns(UserWarning, match="the launcher asks for mixed precision bf16, the recipe decides"):
        assert losses_of(trained(tmp_path)) == plain
    assert os.environ[LAUNCHER] == "no"


def test_optimizer_betas_schedule_and_batch_sizes_reach_the_trainer(tmp_path: Path) -> None:
    trainer = Case("schema_bank", {}, tmp_path).trained(
        {
            "training.optimizer": "sgd", "training.betas": [0.8, 0.9], "training.epsilon": 1e-6, "training.dataloader_workers": 1,
            "training.lr_scheduler": "cosine_with_min_lr", "training.lr_scheduler_args": {"min_lr_rate": 0.5},
            "training.per_device_eval_batch_size": 3,
        },
        alone=True,
    )  # fmt: skip
    args = trainer.args
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.8, 0.9, 1e-6)
    assert args.per_device_eval_batch_size == 3 and args.dataloader_num_workers == 1
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.5 * 1e-2)
