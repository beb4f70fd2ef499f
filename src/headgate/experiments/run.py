"""One run: data, model, training, evaluation, result; whatever happens, what was done is kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from headgate.errors import CheckpointError, ConfigError, Stopped
from headgate.evaluation.predictions import write_predictions
from headgate.evaluation.tasks import run_task
from headgate.experiments.console import Console as Console
from headgate.experiments.continual import continual
from headgate.experiments.entry import job_of, train_with_entry
from headgate.experiments.inputs import input_digests, require_same_defaults
from headgate.experiments.model_card import model_card
from headgate.experiments.paths import with_paths
from headgate.experiments.prepared import Prepared, prepare_run
from headgate.experiments.recipe import Recipe
from headgate.experiments.records import Figures, RunRecord
from headgate.experiments.resumption import changed_ranks, check_ranks, micro_batches
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.trainers import make_trainer, quiet, training_arguments
from headgate.experiments.untrained import attached_untrained
from headgate.experiments.verification import failures, verification
from headgate.files import write_atomically
from headgate.models.sharding import is_sharded
from headgate.training import checkpoint, processes
from headgate.training.telemetry import JsonlCallback
from headgate.training.trainer import HeadgateTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Console", "evaluate", "final_validation", "make_trainer", "quiet", "run"]


def run(
    recipe: Recipe, *, console: Console | None = None, fresh: bool = False, resume: bool = False
) -> RunDirectory:
    """Train and evaluate a recipe in its run directory.

    A complete run is left as it is; a partial or failed one resumes from its newest whole checkpoint.
    Several ranks (``--nproc``, torchrun) run it together: rank 0 writes, an error or a stop of one ends all.
    ``fresh`` starts over; ``resume`` demands something to resume. RunBusy is raised where another process
    writes the same run; KeyboardInterrupt after a checkpoint was saved when Ctrl-C or SIGTERM arrived.
    """
    recipe = with_paths(recipe)
    processes.join(recipe.model.device)
    processes.begin_run()
    console = (console if processes.is_writer() else None) or Console()
    directory = RunDirectory.of(recipe)
    with processes.failing_together():
        check_ranks(recipe)
    with processes.failing_together(), _held_by_writer(directory):
        # only who holds the lock knows the status: whoever held it before may have finished the run meanwhile
        start = processes.on_writer(lambda: _start(recipe, directory, console, fresh, resume))
        if start is None:
            return directory
        newest, steps_of = start
        prepared = prepare_run(recipe, steps_of)
        with processes.failing_together(directory.fail):
            processes.on_writer(lambda: directory.open(recipe, fresh=fresh))
            _train_and_evaluate(prepared, directory, console, newest)
    return directory


@contextmanager
def _held_by_writer(directory: RunDirectory) -> Iterator[None]:
    """The lock of the run, in the hands of rank 0."""
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(directory.held())

        processes.on_writer(lock)
        yield


def _start(
    recipe: Recipe, directory: RunDirectory, console: Console, fresh: bool, resume: bool
) -> tuple[Path | None, int] | None:
    """The checkpoint to go on from and the micro-batches of an optimizer step; None where nothing is left to do."""
    if directory.status == "complete" and not fresh:
        require_same_defaults(directory, recipe)
        directory.require_same_inputs(input_digests(recipe))
        console.say(f"{directory.path} is complete: nothing to do (--fresh runs it again)")
        return None
    if directory.result_file.exists() and not fresh:
        console.say(f"{directory.damage()}: it is not taken for a result, the run goes on")
    if resume and not directory.resumable:
        raise CheckpointError(f"nothing to resume: {directory.path} has no checkpoint")
    newest = None if fresh else checkpoint.last_valid(directory.trainer_dir, tell=warnings.warn)
    total = micro_batches(recipe, newest)
    if newest is not None and (changed := changed_ranks(newest, total)) is not None:
        console.say(changed)
    return newest, total


def _train_and_evaluate(
    prepared: Prepared, directory: RunDirectory, console: Console, newest: Path | None
) -> None:
    recipe = prepared.recipe
    for name, report in prepared.reports.items():
        console.say(f"{name}: {report}")
    started = time.time()
    result: RunRecord = {
        "run_id": recipe.run_id(),
        "name": recipe.name,
        "seed": recipe.seed,
        "data": {name: report.as_dict() for name, report in prepared.reports.items()},
    }
    if recipe.steps_given != 0 and recipe.entry is not None:
        result["training"], history = _train_with_entry(recipe.entry, prepared, directory, console)
    elif recipe.steps_given != 0:
        result["training"], history = _train(prepared, directory, console, newest)
    else:
        result["training"] = {"steps": 0, "trained_tokens": 0, "flops": 0, "seconds": 0.0}
        history = attach_untrained(prepared, directory)
    if is_sharded(
        prepared.model
    ):  # every forward needs every rank's share: all evaluate the same, one writes
        _conclude(prepared, directory, console, result, history, started, together=True)
        return
    if not processes.is_writer():
        prepared.release_model()  # the writer alone evaluates and verifies
    processes.on_writer(lambda: _conclude(prepared, directory, console, result, history, started))


def _conclude(
    prepared: Prepared,
    directory: RunDirectory,
    console: Console,
    result: RunRecord,
    history: list[dict[str, float]],
    started: float,
    *,
    together: bool = False,
) -> None:
    """What the writer does when training has ended: evaluate, verify, write the result. ``together``: all ranks do."""
    recipe = prepared.recipe
    if prepared.segments and result["training"]["steps"] in (0, prepared.segments[-1][1]):
        result["continual"] = continual(recipe, history, prepared.segments)
    result["evaluation"] = evaluate(prepared.model, prepared.tokenizer, recipe, directory, console)
    env = directory.environment()
    result["versions"], result["hardware"] = env["versions"], env["hardware"]
    if recipe.steps_given != 0 and processes.is_writer():
        write_atomically(directory.checkpoint / "README.md", model_card(recipe, result))
        checkpoint.seal(directory.checkpoint)
    if together:
        processes.barrier()  # what is verified has been written
    prepared.release_model()  # what was saved is loaded beside nothing: one model in memory at a time
    console.say("verifying: what was saved is loaded again and compared with what is reported")
    result["verification"] = verification(
        directory, result, prepared.validation, parallel=recipe.model.parallel if together else None
    )
    for line in failures(result["verification"]):
        console.say(f"NOT VERIFIED: {line}")
    result["elapsed_seconds"] = time.time() - started
    if processes.is_writer():
        directory.finish(result)


def _train(
    prepared: Prepared, directory: RunDirectory, console: Console, newest: Path | None
) -> tuple[Figures, list[dict[str, float]]]:
    """Training's part of the result, and the log."""
    trainer = make_trainer(prepared, directory, console.callbacks)
    if newest is not None:
        console.say(f"resuming from {newest}")
    else:
        for name, report in prepared.reports.items():
            if name.startswith("train"):
                trainer.telemetry.set("packed_sequence_length_histogram", report.length_histogram)
    trainer.args.eval_on_start = bool(prepared.segments) and newest is None
    trainer.add_callback(trainer.signals)
    with trainer.signals:
        trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
    if trainer.signals.stopping and trainer.state.global_step < trainer.state.max_steps:
        console.say(f"stopped at step {trainer.state.global_step}: saved in {directory.trainer_dir}")
        processes.barrier()
        raise Stopped
    validation = final_validation(trainer)
    trainer.save_model(str(directory.checkpoint))
    prepared.tokenizer.save_pretrained(directory.checkpoint)
    totals = trainer.totals()
    history = [row for row in trainer.state.log_history if "loss" in row]
    figures = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": history[-1]["loss"] if history else None,
        "trained_tokens": totals.trained_tokens,
        "seconds": trainer.stopwatch.stop(),
        "flops": totals.flops,
        "memory_peak": history[-1]["memory_peak"] if history else None,
        "trainable_parameters": sum(p.numel() for p in trainer.named_trainable.values()),
        "parameters": sum(p.numel() for p in trainer.anatomy.model.parameters()),
        **validation,
        **trainer.summary(),
    }
    return figures, trainer.state.log_history


def _train_with_entry(
    entry: str, prepared: Prepared, directory: RunDirectory, console: Console
) -> tuple[Figures, list[dict[str, float]]]:
    """As ``_train`` by a user's own code, which starts over where it was interrupted; validated and saved as every run."""
    job = job_of(prepared, training_arguments(prepared, directory))
    metrics = JsonlCallback(directory.metrics_file)
    figures = train_with_entry(entry, job, [metrics, *console.callbacks])
    trainer = make_trainer(prepared, directory)
    trainer.state.global_step = figures["steps"]
    trainer.run_state.trained_tokens, trainer.run_state.flops = figures["trained_tokens"], figures["flops"]
    trainer.stopwatch.seconds = figures["seconds"]
    validation = final_validation(trainer)
    trainer.save_model(str(directory.checkpoint))
    prepared.tokenizer.save_pretrained(directory.checkpoint)
    sizes = {
        "trainable_parameters": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in trainer.anatomy.model.parameters()),
    }
    return {**figures, **sizes, **validation}, trainer.state.log_history


def attach_untrained(prepared: Prepared, directory: RunDirectory) -> list[dict[str, float]]:
    """A run of no steps is still evaluated with its methods in the model, as they stand at the start.

    Returns the log: of a stream, the losses of its skills.
    """
    if prepared.segments:
        trainer = make_trainer(prepared, directory)
        trainer.evaluate()
        return list(trainer.state.log_history)
    attached_untrained(prepared.recipe, prepared.model)
    return []


def final_validation(trainer: HeadgateTrainer) -> dict[str, float]:
    """Validation losses of the model that is saved; measured now if it is not the one evaluated last."""
    if trainer.eval_dataset is None:
        return {}
    step = trainer.state.global_step
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if best not in (None, step) or not any(
        row["step"] == step and any(k.startswith("eval_") for k in row) for row in trainer.state.log_history
    ):
        trainer.evaluate()
    rows = [row for row in trainer.state.log_history if row["step"] == step]
    return {k: v for row in rows for k, v in row.items() if k.startswith("eval_") and k.endswith("loss")}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    directory: RunDirectory,
    console: Console,
) -> dict[str, Figures]:
    """Every task of the recipe, and the ``seconds`` it took; predictions are written as each task ends."""
    metrics = {}
    keys = [task.key for task in recipe.evaluation]
    if len(set(keys)) < len(keys):
        raise ConfigError(
            f"two evaluation entries are called {max(keys, key=keys.count)!r}: give one a label"
        )
    for task in recipe.evaluation:
        start = time.perf_counter()
        result = run_task(
            model,
            tokenizer,
            task,
            partial(console.progress, f"evaluate {task.key}"),
        )
        metrics[task.key] = {**result.metrics, "seconds": time.perf_counter() - start}
        if processes.is_writer():
            write_predictions(directory.predictions / f"{task.key}.jsonl", result.items)
    return metrics
