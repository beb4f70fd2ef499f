"""One run: data, model, training, evaluation, result; whatever happens, what was done is kept."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments

from headgate.data.collation import Collator
from headgate.errors import CheckpointError, ConfigError
from headgate.evaluation.predictions import write_predictions
from headgate.evaluation.tasks import run_task
from headgate.experiments.console import Console as Console
from headgate.experiments.continual import SegmentEnds, continual
from headgate.experiments.inputs import input_digests
from headgate.experiments.model_card import model_card
from headgate.experiments.paths import with_paths
from headgate.experiments.prepared import Prepared, prepare_run
from headgate.experiments.recipe import Recipe
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.untrained import attached_untrained
from headgate.experiments.verification import failures, verification
from headgate.files import write_atomically
from headgate.training import checkpoint
from headgate.training.order import Replay
from headgate.training.telemetry import JsonlCallback
from headgate.training.trainer import HeadgateTrainer, StopSignals


def run(
    recipe: Recipe, *, console: Console | None = None, fresh: bool = False, resume: bool = False
) -> RunDirectory:
    """Train and evaluate a recipe in its run directory.

    A complete run is left as it is; a partial or failed one resumes from its newest whole checkpoint.
    ``fresh`` starts over; ``resume`` demands something to resume. RunBusy is raised where another process
    writes the same run; KeyboardInterrupt after a checkpoint was saved when Ctrl-C or SIGTERM arrived.
    """
    console = console or Console()
    recipe = with_paths(recipe)
    directory = RunDirectory.of(recipe)
    with directory.held():
        # only who holds the lock knows the status: whoever held it before may have finished the run meanwhile
        if directory.status == "complete" and not fresh:
            directory.require_same_inputs(input_digests(recipe))
            console.say(f"{directory.path} is complete: nothing to do (--fresh runs it again)")
            return directory
        if directory.result_file.exists() and not fresh:
            console.say(f"{directory.damage()}: it is not taken for a result, the run goes on")
        if resume and not directory.resumable:
            raise CheckpointError(f"nothing to resume: {directory.path} has no checkpoint")
        prepared = prepare_run(recipe)
        try:
            directory.open(recipe, fresh=fresh)
            _train_and_evaluate(prepared, directory, console)
        except KeyboardInterrupt:
            raise
        except Exception as error:
            directory.fail(error)
            raise
    return directory


def make_trainer(prepared: Prepared, directory: RunDirectory, console: Console) -> HeadgateTrainer:
    """The trainer of a run, not started."""
    recipe, training = prepared.recipe, prepared.recipe.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory.path / "tensorboard")
    stages = prepared.stages
    max_steps = recipe.steps_given
    rough = max_steps if max_steps is not None else _epoch_steps(recipe, len(prepared.train))
    evaluates = prepared.validation is not None
    stopping = training.early_stopping
    interval = training.interval(training.eval_every, rough)
    arguments = TrainingArguments(
        output_dir=str(directory.trainer_dir),
        max_steps=max_steps if max_steps is not None else -1,
        num_train_epochs=training.epochs or 1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=recipe.validation_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval if stopping else training.interval(training.save_every, rough),
        save_total_limit=2,
        load_best_model_at_end=stopping is not None,
        metric_for_best_model=stopping.metric if stopping else None,
        logging_steps=recipe.logging_every,
        logging_first_step=True,
        seed=recipe.seed,
        use_cpu=next(prepared.model.parameters()).device.type == "cpu",
        report_to=[tracker for tracker in recipe.report_to if tracker != "jsonl"],
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length"
        if recipe.data.group_by_length and not recipe.data.packing
        else "random",
        length_column_name="length",
        run_name=recipe.name,
        label_names=["labels"],
    )
    columns = {column: method.name for method in prepared.methods for column in method.columns()}
    trainer = HeadgateTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=Collator(
            prepared.tokenizer.pad_token_id, ["example_id", *columns], column_owners=columns
        ),
        eval_collator=Collator(prepared.tokenizer.pad_token_id, ["example_id"]),
        processing_class=prepared.tokenizer,
        methods=prepared.methods,
        stages=stages,
        loss=training.loss,
        label_smoothing=training.label_smoothing,
        schedule_clock=training.schedule_clock,
        replay=Replay(**recipe.data.replay.model_dump()) if recipe.data.replay else None,
        callbacks=[JsonlCallback(directory.metrics_file), *console.callbacks],
    )
    trainer.base_model = recipe.model.model_dump(mode="json", exclude={"device", "adapter"})
    if stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(stopping.patience))
    if prepared.segments:
        trainer.add_callback(SegmentEnds(prepared.segments))
    quiet(trainer)
    return trainer


def quiet(trainer: Any) -> None:
    """transformers prints every log as a dict where there is no bar; ours go to the console and metrics.jsonl."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _epoch_steps(recipe: Recipe, rows: int) -> int:
    per_step = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
    return max(1, round((recipe.training.epochs or 1) * rows / per_step))


def _train_and_evaluate(prepared: Prepared, directory: RunDirectory, console: Console) -> None:
    recipe = prepared.recipe
    for name, report in prepared.reports.items():
        console.say(f"{name}: {report}")
    started = time.time()
    result: dict[str, Any] = {
        "run_id": recipe.run_id(),
        "name": recipe.name,
        "seed": recipe.seed,
        "data": {name: report.as_dict() for name, report in prepared.reports.items()},
    }
    if recipe.steps_given != 0:
        result["training"], history = _train(prepared, directory, console)
    else:
        result["training"] = {"steps": 0, "trained_tokens": 0, "flops": 0, "seconds": 0.0}
        history = attach_untrained(prepared, directory)
    if prepared.segments and result["training"]["steps"] in (0, prepared.segments[-1][1]):
        result["continual"] = continual(recipe, history, prepared.segments)
    result["evaluation"] = evaluate(prepared.model, prepared.tokenizer, recipe, directory, console)
    env = directory.environment()
    result["versions"], result["hardware"] = env["versions"], env["hardware"]
    if recipe.steps_given != 0:
        write_atomically(directory.checkpoint / "README.md", model_card(recipe, result))
        checkpoint.seal(directory.checkpoint)
    prepared.release_model()  # what was saved is loaded beside nothing: one model in memory at a time
    console.say("verifying: what was saved is loaded again and compared with what is reported")
    result["verification"] = verification(directory, result, prepared.validation)
    for line in failures(result["verification"]):
        console.say(f"NOT VERIFIED: {line}")
    result["elapsed_seconds"] = time.time() - started
    directory.finish(result)


def _train(
    prepared: Prepared, directory: RunDirectory, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Training's part of the result, and the log."""
    trainer = make_trainer(prepared, directory, console)
    newest = checkpoint.last_valid(directory.trainer_dir, tell=warnings.warn)
    if newest is not None:
        console.say(f"resuming from {newest}")
    else:
        for name, report in prepared.reports.items():
            if name.startswith("train"):
                trainer.telemetry.set("packed_sequence_length_histogram", report.length_histogram)
    trainer.args.eval_on_start = bool(prepared.segments) and newest is None
    with StopSignals() as signals:
        trainer.add_callback(signals)
        trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
    if signals.received is not None and trainer.state.global_step < trainer.state.max_steps:
        console.say(f"stopped at step {trainer.state.global_step}: saved in {directory.trainer_dir}")
        raise KeyboardInterrupt
    validation = final_validation(trainer)
    trainer.save_model(str(directory.checkpoint))
    prepared.tokenizer.save_pretrained(directory.checkpoint)
    history = [row for row in trainer.state.log_history if "loss" in row]
    figures = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": history[-1]["loss"] if history else None,
        "trained_tokens": float(trainer.trained_tokens),
        "seconds": trainer.stopwatch.stop(),
        "flops": float(trainer.flops),
        "memory_peak": history[-1]["memory_peak"] if history else None,
        "trainable_parameters": sum(p.numel() for p in trainer.named_trainable.values()),
        "parameters": sum(p.numel() for p in trainer.anatomy.model.parameters()),
        **validation,
        **trainer.summary(),
    }
    return figures, trainer.state.log_history


def attach_untrained(prepared: Prepared, directory: RunDirectory) -> list[dict[str, Any]]:
    """A run of no steps is still evaluated with its methods in the model, as they stand at the start.

    Returns the log: of a stream, the losses of its skills.
    """
    if prepared.segments:
        trainer = make_trainer(prepared, directory, Console())
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
    model: Any, tokenizer: Any, recipe: Recipe, directory: RunDirectory, console: Console
) -> dict[str, Any]:
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
            lambda done, total, name=task.key: console.progress(f"evaluate {name}", done, total),
        )
        metrics[task.key] = {**result.metrics, "seconds": time.perf_counter() - start}
        write_predictions(directory.predictions / f"{task.key}.jsonl", result.items)
    return metrics
