"""Logs, validations and checkpoints of a trainer with methods: sealed folders, exact resume, one set of names."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from transformers import set_seed

from headgate.errors import TrainingError
from headgate.models import private
from headgate.models.anatomy import Batch
from headgate.models.sharding import at_rest
from headgate.training import checkpoint, processes, replicas
from headgate.training.accounting import peak_memory_bytes
from headgate.training.figures import over_ranks
from headgate.training.parts import TrainerParts
from headgate.training.shares import deal_validation

if TYPE_CHECKING:
    from torch import nn
    from transformers.trainer_utils import TrainOutput


class SavingOverrides(TrainerParts):
    """What a ``Trainer`` writes while it trains. It assigns no attribute of its own."""

    # -- logs and validations -------------------------------------------------------------------------
    def log(self, logs: dict[str, object], start_time: float | None = None) -> None:
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
            logs = {**logs, "train_loss": self._train_loss()}
        super().log(logs, start_time)

    def _train_loss(self) -> float:
        return self.totals().summed_loss / max(self.state.global_step, 1)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        self.stopwatch.stop()
        self.methods.eval()
        prefix = str(kwargs.get("metric_key_prefix", "eval"))
        skill = prefix.removeprefix("eval_") if prefix.startswith("eval_") else None
        dataset = kwargs.get("eval_dataset", args[0] if args else None)
        several = isinstance(self.eval_dataset if dataset is None else dataset, dict)
        alone = skill is None and not several
        replicas.broadcast(list(self.methods.buffers()))
        probe = functools.partial(self.validation_batches, dataset) if alone else None
        self.methods.evaluation.start_validation(skill, probe)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        at_rest(self.anatomy.model)
        if not several:
            self.methods.evaluation.end_validation(metrics)
        return metrics

    def validation_batches(self, dataset: object) -> Iterator[Batch]:
        """The batches that a validation of ``dataset`` reads, on the device; all of them on every rank."""
        loader = self.get_eval_dataloader(dataset)
        deal_validation(loader, whole=True)
        for batch in loader:
            yield private.inputs_on_device(self, batch)

    # -- checkpoints ----------------------------------------------------------------------------------
    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        description = self.saver.description()  # of all ranks, so all take part
        at_rest(self.anatomy.model)
        if not self.args.should_save:
            return
        if self.base_is_frozen:  # its weights lie where they were loaded from
            folder.mkdir(parents=True, exist_ok=True)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        else:
            super()._save(output_dir, state_dict)
        self.saver.save_methods(folder, description)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers.Trainer.save_model; the folder is sealed, so that a later change of a file is noticed."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:  # a checkpoint is sealed when all of it is there
            checkpoint.seal(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.stopwatch.stop()
        self.saver.check()
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        run_dir, name = private.run_folder(self, trial), f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            processes.barrier()  # every rank has written its random state
            if self.args.should_save:
                checkpoint.seal(run_dir / name)
            processes.barrier()  # no rank goes on to read what is not sealed
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"{name} in {self.args.output_dir} could not be written ({error}): "
                "free some space and run again, which resumes from the checkpoint before it"
            ) from error
        finally:
            self.args.save_total_limit = keep
        if self.args.should_save:
            checkpoint.rotate(run_dir, keep, self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None, **kwargs: object) -> TrainOutput:
        """As transformers.Trainer.train; ``True`` resumes from the newest checkpoint that is whole.

        A checkpoint of the run's last step is loaded and not trained any further.
        """
        folder = self.saver.begin(resume_from_checkpoint)
        self.stages.first = 0
        if folder is None:
            self.run_state.summed_loss = 0.0
        set_seed(self.args.seed)  # the data order follows from the seed, whatever drew random numbers before
        output: TrainOutput = super().train(resume_from_checkpoint=folder, **kwargs)
        self.stages.tell_where_the_schedule_ended()
        return output._replace(training_loss=self._train_loss())

    def _init_training_state(self, max_steps: int, *args: object, **kwargs: object) -> object:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.saver.restore_callbacks()
        return position

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.base_is_frozen:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.stages.first = self.saver.restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not self.base_is_frozen:
            super()._load_best_model()
        checkpoint.restore_methods(Path(self.state.best_model_checkpoint), self.methods)
