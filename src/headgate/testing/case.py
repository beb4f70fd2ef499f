"""One method under examination: recipes with it, trainers of them, and what they come to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from headgate.experiments.prepared import Prepared, prepare_run
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import recipe_from, set_dotted
from headgate.experiments.records import Content
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.trainers import make_trainer
from headgate.methods.base import Method
from headgate.methods.registry import method_class
from headgate.models.anatomy import model_inputs
from headgate.models.aside import look_aside
from headgate.training.trainer import HeadgateTrainer

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

STEPS = 6
_NUMBERS = itertools.count()


class NotApplicable(Exception):
    """The law says nothing about this method; the message says why."""


@dataclass(frozen=True)
class Case:
    """A method by name and options, on a small model, below ``folder``."""

    name: str
    options: Mapping[str, object]
    folder: Path
    model: str = "random:llama"
    others: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Other methods in the same run, by name."""

    @property
    def kind(self) -> type[Method]:
        return method_class(self.name)

    def beside(self, **others: Mapping[str, object]) -> Case:
        """The same method in the company of others."""
        return Case(self.name, self.options, self.folder, self.model, others)

    def recipe(self, changes: Mapping[str, object] | None = None, *, alone: bool = False) -> Recipe:
        """A short run with the method (``alone``: of the adapter alone) and with dotted changes."""
        methods = (
            {} if alone else {self.name: dict(self.options), **{n: dict(o) for n, o in self.others.items()}}
        )
        brings_adapter = any(method_class(name).is_adapter for name in methods)
        content: Content = {
            "name": "conform",
            "output_dir": str(self.folder / str(next(_NUMBERS))),
            "model": {"name_or_path": self.model, "device": "cpu"},
            "lora": None if brings_adapter else {"r": 2, "alpha": 4, "dropout": 0.0},
            "data": {
                "train": {"source": "wordmath", "limit": 24},
                "validation": {"source": "wordmath", "split": "validation", "limit": 6},
                "max_length": 128,
                "long_prompts": "drop",
            },
            "training": {
                "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_every": 1, "eval_every": 3,
            },
            "methods": methods,
            "logging_every": 1,
        }  # fmt: skip
        for dotted, value in (changes or {}).items():
            set_dotted(content, dotted, value)
        return recipe_from(content, f"conform {self.name}")

    def prepared(self, changes: Mapping[str, object] | None = None, *, alone: bool = False) -> Prepared:
        """Model, data and methods of ``recipe``, the methods not attached yet."""
        return prepare_run(self.recipe(changes, alone=alone))

    def trainer(self, changes: Mapping[str, object] | None = None, *, alone: bool = False) -> HeadgateTrainer:
        """A trainer of ``recipe``, not started; its losses are kept."""
        prepared = self.prepared(changes, alone=alone)
        directory = RunDirectory.of(prepared.recipe)
        directory.open(prepared.recipe)
        trainer = make_trainer(prepared, directory)
        trainer.add_callback(KeptCheckpoints())
        return trainer

    def trained(self, changes: Mapping[str, object] | None = None, *, alone: bool = False) -> HeadgateTrainer:
        """A trainer that has run to its end."""
        trainer = self.trainer(changes, alone=alone)
        trainer.train()
        return trainer


class KeptCheckpoints(TrainerCallback):
    """Checkpoints of every step stay: laws resume from any of them."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        args.save_total_limit = None


def losses_of(trainer: HeadgateTrainer) -> list[float]:
    """Every logged training loss."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row and "stage_step" in row]


def weights_of(trainer: HeadgateTrainer) -> dict[str, Tensor]:
    """Copies of everything that trains, and of the methods' buffers."""
    own = {f"methods.{name}": tensor for name, tensor in trainer.methods.state_dict().items()}
    return {name: t.detach().clone() for name, t in {**trainer.named_trainable, **own}.items()}


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are absent on a side or differ in any bit."""
    return [
        name
        for name in {**one, **other}
        if name not in one or name not in other or not _equal(one[name], other[name])
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) if a.is_floating_point() else torch.equal(a, b)


def batch_of(trainer: HeadgateTrainer) -> dict[str, Tensor]:
    """The first validation batch, as the model takes it and without labels."""
    batch = next(iter(trainer.get_eval_dataloader()))
    return model_inputs(batch, labels=False)


@torch.no_grad()
def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


@contextmanager
def evaluating(trainer: HeadgateTrainer) -> Iterator[Any]:
    """The trainer's model and methods in evaluation mode."""
    assert trainer.model is not None
    with look_aside(trainer.model), look_aside(trainer.methods):
        yield trainer.model
