"""MethodsMixin: the methods inside any transformers.Trainer.

The trainer's own loop, precision, accumulation and logging stay as they are. This class only overrides ``Trainer`` methods and
hands over to parts that own their state: what trains when (``stages``), whose loss (``task_objective``), the accumulation window
(``window``), one micro-batch (``micro_batch``), the counters (``run_state``), and checkpoints (``saver``). Logs, validations and
checkpoints are overridden in ``saving``; every attribute is assigned here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.compose import MethodStack
from headgate.methods.stage import Stage
from headgate.methods.step import Step
from headgate.models import private
from headgate.models.anatomy import Batch, Columns, describe
from headgate.models.sharding import is_sharded, keep_in_step
from headgate.ops.randomness import derive_seed, seed_device
from headgate.training import processes, replicas
from headgate.training.accounting import Stopwatch
from headgate.training.checks import FiniteWatch, check_compile
from headgate.training.config import LossChoice, ScheduleClock
from headgate.training.counted import count_readings
from headgate.training.loss import trained_tokens
from headgate.training.micro_batch import MicroBatch
from headgate.training.objective import Objective
from headgate.training.rows import check_rows, require_labels
from headgate.training.run_state import RunState
from headgate.training.saver import Saver
from headgate.training.saving import SavingOverrides
from headgate.training.shares import deal_training
from headgate.training.signals import StopSignals
from headgate.training.stages import Stages
from headgate.training.telemetry import Telemetry
from headgate.training.viewed import ViewedBatches, formed_batches
from headgate.training.window import Windows

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

    from headgate.training.schedule import ClockedScheduler


class MethodsMixin(SavingOverrides):
    """Put before a transformers.Trainer: ``class MyTrainer(MethodsMixin, SFTTrainer)``.

    Args (besides the trainer's own):
        methods: what routes and gates; attached here, detached by ``detach_methods``.
        stages: a curriculum; None takes the methods' own, or one stage over ``args.learning_rate``.
        loss: ``auto``, ``plain`` (the model's own) or ``chunked`` (no [B, T, V] logits). A trainer that overrides
            ``compute_loss``, or has a ``compute_loss_func``, trains that loss instead.
        label_smoothing: of the chunked loss.
        schedule_clock: whether a window in which nothing was accepted advances the schedule (``offered``).
    """

    def __init__(
        self,
        *args: object,
        methods: Sequence[Method] | MethodStack = (),
        stages: Sequence[Stage] | None = None,
        loss: LossChoice = "auto",
        label_smoothing: float = 0.0,
        schedule_clock: ScheduleClock = "offered",
        **kwargs: object,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, nn.Module):
            raise ConfigError("HeadgateTrainer needs a loaded model: pass model=...")
        self.methods = MethodStack(methods)
        self.anatomy = describe(model)
        self.base_is_frozen = self.anatomy.model is model and self.methods.brings_adapter
        if self.base_is_frozen:
            model.requires_grad_(False)
        if is_sharded(model):
            keep_in_step(model)
        adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.methods.set_seed(_seed_of(args, kwargs))
        self.methods.attach(self.anatomy)
        object.__setattr__(model, "headgate_methods", self.methods)
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ConfigError("use HeadgateTrainer(label_smoothing=...) instead of label_smoothing_factor")
        check_compile(self.args, self.methods.names, is_sharded(model))
        check_rows(self.train_dataset, str(getattr(self.args, "train_sampling_strategy", "")))
        self.methods.to(self.args.device)
        self.task_objective = Objective(self, MethodsMixin, loss, label_smoothing)
        self.stages = Stages(self, adapter, stages, schedule_clock)
        self.run_state, self.windows, self.saver = RunState(), Windows(self), Saver(self)
        self.telemetry, self.stopwatch, self.signals = Telemetry(), Stopwatch(), StopSignals()
        self.finite_watch = FiniteWatch(self.args.output_dir)
        self.base_model: dict[str, object] | None = None  # the recipe's model block, to load it again
        self.batches: ViewedBatches | None = None  # where a method forms its own
        replicas.take_over_reduction(self.accelerator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = ["segment_ids", "position_ids", "example_id", "labels"]
        private.keep_columns(self, [*self.methods.columns(), *extra])

    # -- data -----------------------------------------------------------------------------------------
    def get_train_dataloader(self) -> DataLoader[Batch] | ViewedBatches:
        loader: DataLoader[Batch] = super().get_train_dataloader()
        deal_training(loader)
        self.batches = formed_batches(loader, self.methods, self.args)
        if self.batches is None:
            return loader
        if self.saver.folder is not None:
            self.batches.load(self.saver.folder, self.args.device)
        return self.batches

    def get_batch_samples(self, *args: object, **kwargs: object) -> object:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.windows.offer(batches, items)
        return batches, items

    def _maybe_log_save_evaluate(self, *args: object, **kwargs: object) -> object:
        """``epoch`` counts passes over the offered data: the trainer's own count would begin anew at a resume."""
        self.stages.end_what_is_over()
        count_readings(self)
        if self.batches is not None:
            self.state.epoch = self.batches.passes
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args: object, **kwargs: object) -> object:
        """A view that was restored stands where it should: the trainer must not skip its batches again."""
        if (
            self.saver.is_finished
        ):  # resumed at the end: transformers would take one more step before it looks
            self.control.should_training_stop = True
            return None
        keep = self.args.ignore_data_skip
        self.args.ignore_data_skip = keep or self.batches is not None
        try:
            return super()._run_epoch(*args, **kwargs)
        finally:
            self.args.ignore_data_skip = keep

    # -- steps ----------------------------------------------------------------------------------------
    def training_step(self, model: nn.Module, inputs: Columns, num_items_in_batch: object = None) -> Tensor:
        self.stopwatch.start()
        self.windows.open()
        count_readings(self)
        model.train()
        self.methods.train()
        step = self._step(model, private.inputs_on_device(self, inputs), self.window.items)
        seed_device(derive_seed(self.args.seed, step.micro_step, "dropout", 0), self.args.device)
        MicroBatch(self, step).run()
        if step.is_window_end:
            self.windows.close(step)
        self.telemetry.add(self.methods.on_step_end(step))
        self.window.last = step
        self.window.index += 1
        self.run_state.micro_step += 1
        loss = step.task_loss if step.task_loss is not None else torch.zeros((), device=self.args.device)
        step.hidden = step.logits = step.outputs = None
        loss = loss / step.window_size
        self.run_state.summed_loss = self.run_state.summed_loss + loss.detach()
        return loss

    def _step(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Step:
        """What the methods may see of the micro-batch that begins."""
        assert self.curriculum is not None
        done, every = self.state.global_step, self.state.logging_steps or 1
        return Step(
            batch=batch,
            scheduled=self.curriculum.current,
            global_step=done,
            micro_step=self.micro_step * processes.world_size() + processes.rank(),
            seed=self.args.seed,
            max_steps=self.state.max_steps,
            model=model,
            window_index=self.window.index,
            window_size=self.current_gradient_accumulation_steps,
            epoch=float(self.state.epoch or 0.0) if self.batches is None else self.batches.epoch,
            num_tokens=trained_tokens(require_labels(batch)),
            window_tokens=num_items,
            should_log=(done + 1) % every == 0 or done == 0,
            sum_across_ranks=replicas.sum_across_ranks,
        )

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        found: Tensor | tuple[Tensor, ModelOutput] = super().compute_loss(
            model,
            self.model_inputs(inputs),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        return found

    def _clip_grad_norm(self, model: PreTrainedModel) -> Tensor | float | None:
        return self._clipped(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: object = None) -> Tensor | None:
        """Called once before every optimizer step: a gradient that is not finite goes no further."""
        if grad_norm is None:
            grad_norm = self._clipped(model, float("inf"))
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = getattr(self.accelerator, "scaler", None)
        if norm is not None and (scaler is None or not scaler.is_enabled()):  # fp16's scaler skips such steps
            self.finite_watch.add_gradient_norm(norm)
        return norm

    def _clipped(self, model: nn.Module, most: float) -> Tensor | float | None:
        return self.accelerator.clip_grad_norm_([*model.parameters(), *self.methods.parameters()], most)

    def floating_point_ops(self, inputs: object) -> float:
        """FLOPs executed since the last call: skipped forwards, backwards and blocks are not counted."""
        return self.run_state.take_flops()

    # -- optimizer and schedule -----------------------------------------------------------------------
    def _prepare_for_training(
        self, max_steps: int, train_dataloader: object, resume_from_checkpoint: object
    ) -> object:
        self.stages.begin(max_steps, resumed=resume_from_checkpoint is not None)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        replicas.broadcast([*self.named_trainable.values(), *self.methods.buffers()])
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None and self.curriculum is not None:
            self.optimizer = self.stages.make_optimizer()
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler | ClockedScheduler:
        if self.lr_scheduler is None and self.curriculum is not None:
            self.lr_scheduler = self.stages.make_scheduler(self.optimizer if optimizer is None else optimizer)
            private.own_scheduler(self)
        scheduler: LRScheduler | ClockedScheduler = super().create_scheduler(num_training_steps, optimizer)
        return scheduler

    def renew_optimizer(self) -> None:
        """At a step boundary: a fresh optimizer and schedule over what trains from here on."""
        assert self.curriculum is not None
        self.optimizer, self.lr_scheduler = None, None
        private.forget_optimizers(self.accelerator)
        self.optimizer = self.accelerator.prepare(self.create_optimizer())
        self.create_scheduler(self.curriculum.current.steps)
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler


def _seed_of(args: Sequence[object], kwargs: Mapping[str, object]) -> int:
    training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
    return int(getattr(training_args, "seed", 0))
