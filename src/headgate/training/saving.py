"""Checkpoints and logs inside a transformers.Trainer: sealed folders, exact resume, one set of names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import ExportableState

from headgate.errors import TrainingError
from headgate.training import checkpoint, processes, replicas
from headgate.training.accounting import peak_memory_bytes
from headgate.training.checks import require_finite_state
from headgate.training.figures import over_ranks, telemetry_of_all
from headgate.training.shares import deal_validation


class SavedTraining:
    """What is written while training: telemetry, checkpoints that are whole or not at all, the final figures."""

    _resumed = False

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs and self.curriculum is not None:
            seconds = self.stopwatch.read()
            self.finite_watch.check()
            totals = self.totals()
            shown = over_ranks({**self.telemetry.flush(), "memory_peak": peak_memory_bytes()})
            memory = shown.pop("memory_peak")
            logs = {**logs, **shown}
            if "loss" not in shown:
                logs.pop("loss")  # nothing was accepted since the last log: no loss rather than a zero
            scheduled = self.curriculum.current
            logs |= {
                "stage": scheduled.name,
                "stage_step": self.state.global_step - scheduled.start,
                "trained_tokens": totals.trained_tokens,
                "tokens_per_second": totals.trained_tokens / max(seconds, 1e-9),
                "flops": totals.flops,
                "memory_peak": memory,
            }
        if "train_loss" in logs:  # the trainer's own counts only what this process did
            logs = {**logs, "train_loss": self.totals().summed_loss / max(self.state.global_step, 1)}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.stopwatch.stop()
        self.methods.eval()
        prefix = kwargs.get("metric_key_prefix", "eval")
        skill = prefix.removeprefix("eval_") if prefix.startswith("eval_") else None
        dataset = kwargs.get("eval_dataset", args[0] if args else None)
        several = isinstance(self.eval_dataset if dataset is None else dataset, dict)
        alone = skill is None and not several
        replicas.broadcast(list(self.methods.buffers()))
        probe = partial(self._validation_batches, dataset) if alone else None
        self.methods.evaluation.start_validation(skill, probe)
        metrics = super().evaluate(*args, **kwargs)
        if not several:
            self.methods.evaluation.end_validation(metrics)
        return metrics

    @property
    def watches_validation(self) -> bool:
        """Whether a method counts what it sees of a validation: every rank must then see all of it."""
        return bool(self.methods.evaluation.watches_validation)

    def _validation_batches(self, dataset: Any) -> Iterator[Any]:
        """The batches that a validation of ``dataset`` reads, on the device; all of them on every rank."""
        loader = self.get_eval_dataloader(dataset)
        deal_validation(loader, whole=True)
        for batch in loader:
            yield self._prepare_inputs(batch)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        description = self._description()  # of all ranks, so all take part
        if not self.args.should_save:
            return
        if self.base_is_frozen:  # its weights lie where they were loaded from
            folder.mkdir(parents=True, exist_ok=True)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        else:
            super()._save(output_dir, state_dict)
        (folder / "training_args.bin").unlink(missing_ok=True)
        checkpoint.save_methods(folder, self.methods, description)
        if self.batches is not None:
            self.batches.save(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers.Trainer.save_model; the folder is sealed, so that a later change of a file is noticed."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:  # a checkpoint is sealed when all of it is there
            checkpoint.seal(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _description(self) -> dict[str, Any]:
        totals, world = self.totals(), processes.world_size()
        own = {
            "trained_tokens": float(self.trained_tokens),
            "flops": float(self.flops),
            "summed_loss": float(self.summed_loss),
        }
        shares = processes.gather({"counters": own, "telemetry": self.telemetry.state()})
        return {
            "model": self.base_model or {"name_or_path": self.anatomy.model.config._name_or_path},
            "seed": self.args.seed,
            "base_is_frozen": self.base_is_frozen,
            "stage_index": self.curriculum.index if self.curriculum is not None else 0,
            "counters": {
                "micro_step": self.micro_step * world,
                "trained_tokens": totals.trained_tokens,
                "flops": totals.flops,
                "seconds": self.stopwatch.read(),
                "summed_loss": totals.summed_loss,
            },
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "ranks": shares,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.stopwatch.stop()
        self.finite_watch.check()
        replicas.broadcast(
            list(self.methods.buffers())
        )  # each may keep figures of its own rows: one state is saved
        replicas.require_equal(self.named_trainable, self.state.global_step)
        require_finite_state(self.named_trainable, self.optimizer, self.state.global_step)
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        run_dir = Path(self._get_output_dir(trial=trial))
        try:
            super()._save_checkpoint(model, trial)
            processes.barrier()  # every rank has written its random state
            if self.args.should_save:
                checkpoint.seal(run_dir / f"checkpoint-{self.state.global_step}")
            processes.barrier()  # no rank goes on to read what is not sealed
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"checkpoint-{self.state.global_step} in {self.args.output_dir} could not be written ({error}): "
                "free some space and run again, which resumes from the checkpoint before it"
            ) from error
        finally:
            self.args.save_total_limit = keep
        if self.args.should_save:
            checkpoint.rotate(run_dir, keep, self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As transformers.Trainer.train; ``True`` resumes from the newest checkpoint that is whole.

        A checkpoint of the run's last step is loaded and not trained any further.
        """
        if resume_from_checkpoint is True:
            found = checkpoint.last_valid(self.args.output_dir, tell=self._tell)
            resume_from_checkpoint = str(found) if found is not None else None
        elif resume_from_checkpoint:
            checkpoint.require_valid(resume_from_checkpoint)
        self._resumed = bool(resume_from_checkpoint)
        if not self._resumed:
            self.summed_loss = 0.0
        set_seed(self.args.seed)  # the data order follows from the seed, whatever drew random numbers before
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._tell_where_the_schedule_ended()
        return output._replace(training_loss=self.totals().summed_loss / max(self.state.global_step, 1))

    def _tell(self, message: str) -> None:
        warnings.warn(message, stacklevel=3)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self._restore_callbacks()
        return position

    def _restore_callbacks(self) -> None:
        """Counters of early stopping and the like as the checkpoint holds them.

        Not through transformers' ``restore_callback_states_from_checkpoint``: that also restores the order to stop
        which an interrupted run saved, and makes the callbacks anew.
        """
        for callback in self.callback_handler.callbacks:
            saved = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)

    @property
    def _is_finished(self) -> bool:
        """Whether a resumed run stands where it ends: at its last step, or where early stopping ended it.

        A second ``train()`` of the same trainer begins anew, whatever its callbacks counted in the first.
        """
        if not self._resumed:
            return False
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        return self.state.global_step >= self.state.max_steps or stopped

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.base_is_frozen:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        description = checkpoint.restore_methods(Path(resume_from_checkpoint), self.methods)
        counters, world = description["counters"], processes.world_size()
        self._resume_stage = description["stage_index"]
        self.micro_step = counters["micro_step"] // world
        shares = description.get("ranks") or [{"telemetry": description.get("telemetry", {})}]
        if len(shares) == world:
            share = shares[processes.rank()]
            own = share.get("counters", counters)
        else:  # other ranks go on: the first of them takes over what was counted
            first = float(processes.is_writer())
            share = {"telemetry": telemetry_of_all([one["telemetry"] for one in shares], world)}
            own = {name: first * counters[name] for name in ("trained_tokens", "flops")}
            own["summed_loss"] = first * world * counters.get("summed_loss", 0.0)
        self.trained_tokens, self.flops = own["trained_tokens"], own["flops"]
        self._flops_reported = self.flops
        self.summed_loss = own.get("summed_loss", 0.0)
        self.telemetry.restore(share["telemetry"])
        self.stopwatch.seconds = counters["seconds"]
        self._resume_folder = Path(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self.base_is_frozen:
            super()._load_best_model()
        checkpoint.restore_methods(Path(self.state.best_model_checkpoint), self.methods)

    def summary(self) -> dict[str, Any]:
        """Final figures of the methods, for the run's result."""
        figures: dict[str, Any] = self.methods.summary()
        return figures

    def detach_methods(self) -> None:
        """Take every method out of the model."""
        self.methods.detach()
