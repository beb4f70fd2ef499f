"""A run that somebody else's code trains: ``entry: my_module:train``, a function or a transformers.Trainer class.

    def train(job: Job) -> None: ...        # trains job.model in place
    class MyTrainer(transformers.Trainer)   # is built with the recipe's arguments, and its train() called

Data, seed, adapter, evaluation, time and verification are those of every run, so that the arm is judged like any other.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback

from headgate.data.collation import Collator
from headgate.errors import ConfigError, HeadgateError, TrainingError
from headgate.experiments.recipe import Recipe
from headgate.experiments.records import Figures
from headgate.models.anatomy import Batch, describe
from headgate.training import processes
from headgate.training.accounting import backward_flops, forward_flops, peak_memory_bytes
from headgate.training.loss import trained_tokens

if TYPE_CHECKING:
    import datasets
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from headgate.experiments.prepared import Prepared


@dataclass(frozen=True)
class Job:
    """What a training function gets.

    Attributes:
        model: as the recipe makes it, the adapter on it, on its device. Trained in place: nothing is returned.
        tokenizer: of the model. collator: rows -> a batch of ``input_ids``, ``attention_mask``, ``labels`` (-100: not trained).
        train, validation: prepared rows, a ``datasets.Dataset`` each; validation is None where the recipe has none.
        arguments: the recipe's ``transformers.TrainingArguments``: steps, batch size, learning rate, seed.
        recipe: all of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    validation: datasets.Dataset | None
    collator: Collator
    arguments: TrainingArguments
    recipe: Recipe


def check_entry(recipe: Recipe) -> None:
    """``entry`` can be called, and nothing beside it asks for Headgate's own trainer. Raises ConfigError."""
    if recipe.entry is None:
        return
    named_entry(recipe.entry)
    where = f"entry={recipe.entry} trains with its own code"
    for asked, key in (
        (bool(recipe.methods), f"methods.{next(iter(recipe.methods), '')}"),
        (bool(recipe.data.stream), "data.stream"),
        (bool(recipe.data.packing), "data.packing"),
        (bool(recipe.training.stages), "training.stages"),
        (recipe.data.replay is not None, "data.replay"),
        (recipe.training.early_stopping is not None, "training.early_stopping"),
        (recipe.model.parallel is not None, "model.parallel"),
    ):
        if asked:
            raise ConfigError(f"{where}, and {key} needs Headgate's trainer: leave one of them out")
    if processes.world_size() > 1:
        raise ConfigError(f"{where}, in one process: start it without torchrun")


def named_entry(entry: str) -> Callable[..., object]:
    """What ``module:name`` names; modules are found as in Python, the current folder first. Raises ConfigError."""
    module_name, _, name = entry.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        cure = (
            f"run from the folder that holds {module_name.replace('.', '/')}.py, or install it"
            if error.name == module_name.split(".")[0]
            else f"install {error.name}"
        )
        raise ConfigError(f"entry={entry}: there is no module {error.name!r}: {cure}") from None
    except Exception as error:  # whatever a user's own module raises while it is imported
        raise ConfigError(f"entry={entry}: importing {module_name} failed{_place(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name
        ]
        there = f"it has {', '.join(own)}" if own else "it defines no function"
        raise ConfigError(f"entry={entry}: {module_name} has no function {name!r}: {there}")
    if not _is_trainer(found):
        _require_one_argument(entry, found)
    return found


def entry_digest(entry: str) -> str:
    """Of the file that defines it: a run is not resumed or reused when that has changed."""
    file = inspect.getsourcefile(inspect.unwrap(named_entry(entry)))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "no source"


def train_with_entry(entry: str, job: Job, callbacks: list[TrainerCallback]) -> Figures:
    """Train ``job.model`` by it; what it took. Raises TrainingError where it fails, trains nothing, or leaves no numbers."""
    found, before = named_entry(entry), _digests(job.model)
    set_seed(job.recipe.seed)
    with _Counted(job.model) as counted:
        started = time.perf_counter()
        try:
            returned = _trainer(found, job, callbacks).train() if _is_trainer(found) else found(job)
        except HeadgateError:
            raise
        except Exception as error:
            raise TrainingError(f"entry={entry} failed{_place(error)}") from error
        seconds = time.perf_counter() - started
    if not (_is_trainer(found) or returned is None or returned is job.model):
        raise TrainingError(
            f"entry={entry} returned {_short(returned)}: train job.model in place and return nothing"
        )
    after = _digests(job.model)
    if before.keys() != after.keys():
        raise TrainingError(
            f"entry={entry} changed which weights are trained: leave requires_grad and the adapter as the recipe has them"
        )
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise TrainingError(
                f"entry={entry} left {name} with numbers that are not finite: lower its learning rate"
            )
    if before == after:
        raise TrainingError(
            f"entry={entry} trained nothing: all {len(after)} trainable tensors are what they were before it was called"
        )
    return {**counted.figures(), "seconds": seconds, "memory_peak": peak_memory_bytes()}


class _Counted:
    """Optimizer steps, tokens and FLOPs of whatever code trains the model, seen from outside."""

    def __init__(self, model: nn.Module) -> None:
        self._anatomy = describe(model)
        self._trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._adapted = any(not p.requires_grad for p in model.parameters())
        self._steps = self._forwards = 0
        self._tokens = self._flops = 0.0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Counted:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._handles = [
            register_optimizer_step_post_hook(self._stepped),
            self._anatomy.model.register_forward_pre_hook(self._read, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def figures(self) -> Figures:
        """Micro-batches stand for steps where the code steps without a torch optimizer."""
        return {"steps": self._steps or self._forwards, "trained_tokens": self._tokens, "flops": self._flops}

    def _stepped(self, *_: object) -> None:
        self._steps += 1

    def _read(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Batch) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or not (module.training and torch.is_grad_enabled()):
            return
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        lengths = torch.full((len(ids),), float(ids.shape[1])) if mask is None else mask.float().sum(-1)
        tokens, pairs = float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())
        forward = forward_flops(self._anatomy, tokens, pairs)
        self._forwards += 1
        self._tokens += tokens if labels is None else float(trained_tokens(labels))
        self._flops += forward + backward_flops(forward, tokens, self._trainable, self._adapted)


def _is_trainer(found: object) -> TypeGuard[type[Trainer]]:
    return isinstance(found, type) and issubclass(found, Trainer)


def _trainer(kind: type[Trainer], job: Job, callbacks: list[TrainerCallback]) -> Trainer:
    trainer = kind(
        model=job.model,
        args=job.arguments,
        train_dataset=job.train,
        eval_dataset=job.validation,
        data_collator=job.collator,
        processing_class=job.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # ours say what it logs
    return trainer


def _require_one_argument(entry: str, found: Callable[..., object]) -> None:
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        raise ConfigError(f"entry={entry} is called with one argument, the job: {error}") from None
    except ValueError:  # a builtin without a signature
        return


def _digests(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _place(error: BaseException) -> str:
    """`` in my.py, line 3: TypeError: ...``: the last line of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if "site-packages" not in f.filename and "headgate/experiments" not in f.filename
    ]
    frame = next((f for f in reversed(own) if not f.filename.startswith("<")), None)
    where = f" in {Path(frame.filename).name}, line {frame.lineno}" if frame is not None else ""
    said = str(error).strip().splitlines()
    return f"{where}: {type(error).__name__}" + (f": {said[0]}" if said else "")


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__}" if len(text) > 60 else text


def job_of(prepared: Prepared, arguments: TrainingArguments) -> Job:
    """The job of a prepared run; evaluation and checkpoints in between are not the entry's."""
    plain = replace(arguments, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    return Job(
        prepared.model, prepared.tokenizer, prepared.train, prepared.validation,
        Collator(prepared.tokenizer.pad_token_id), plain, prepared.recipe,
    )  # fmt: skip
