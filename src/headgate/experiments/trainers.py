"""The trainer of a run, made from its recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from headgate.data.collation import Collator
from headgate.experiments.continual import SegmentEnds
from headgate.experiments.prepared import Prepared
from headgate.experiments.records import Content
from headgate.experiments.run_directory import RunDirectory
from headgate.training import processes
from headgate.training.order import Replay
from headgate.training.precision import OPTIM, decided_here
from headgate.training.telemetry import JsonlCallback
from headgate.training.trainer import HeadgateTrainer

if TYPE_CHECKING:
    from transformers import Trainer


def training_arguments(prepared: Prepared, directory: RunDirectory) -> TrainingArguments:
    """transformers' arguments of a run, from its recipe."""
    recipe, training = prepared.recipe, prepared.recipe.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory.path / "tensorboard")
    max_steps = recipe.steps_given
    rough = max_steps if max_steps is not None else _epoch_steps(prepared)
    evaluates = prepared.validation is not None
    stopping = training.early_stopping
    interval = training.interval(training.eval_every, rough)
    flags: Content = decided_here(training.precision)
    if training.optimizer in OPTIM:
        flags["optim"] = OPTIM[training.optimizer]
    return TrainingArguments(
        output_dir=str(directory.trainer_dir),
        max_steps=max_steps if max_steps is not None else -1,
        num_train_epochs=training.epochs or 1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=recipe.validation_batch_size,
        gradient_accumulation_steps=prepared.micro_batches // processes.world_size(),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        lr_scheduler_kwargs=dict(training.lr_scheduler_args) or None,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        adam_epsilon=training.epsilon,
        dataloader_num_workers=training.dataloader_workers,
        **flags,
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


def make_trainer(
    prepared: Prepared, directory: RunDirectory, callbacks: Sequence[TrainerCallback] = ()
) -> HeadgateTrainer:
    """The trainer of a run, not started."""
    recipe, training, stopping = (
        prepared.recipe,
        prepared.recipe.training,
        prepared.recipe.training.early_stopping,
    )
    arguments = training_arguments(prepared, directory)
    columns = prepared.methods.columns()
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
        stages=prepared.stages,
        loss=training.loss,
        label_smoothing=training.label_smoothing,
        schedule_clock=training.schedule_clock,
        replay=Replay(**recipe.data.replay.model_dump()) if recipe.data.replay else None,
        callbacks=[JsonlCallback(directory.metrics_file), *callbacks],
    )
    trainer.base_model = recipe.model.model_dump(mode="json", exclude={"device", "adapter", "parallel"})
    if stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(stopping.patience))
    if prepared.segments:
        trainer.add_callback(SegmentEnds(prepared.segments))
    quiet(trainer)
    return trainer


def quiet(trainer: Trainer) -> None:
    """transformers prints every log as a dict where there is no bar; ours go to the console and metrics.jsonl."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _epoch_steps(prepared: Prepared) -> int:
    training = prepared.recipe.training
    per_step = training.per_device_train_batch_size * prepared.micro_batches
    return max(1, round((training.epochs or 1) * len(prepared.train) / per_step))
