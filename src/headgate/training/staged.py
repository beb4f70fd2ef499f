"""Stages inside a transformers.Trainer: a fresh optimizer and schedule for each, swapped at step boundaries."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from headgate.errors import ConfigError
from headgate.methods.compose import LORA_GROUP
from headgate.training import replicas
from headgate.training.curriculum import Curriculum
from headgate.training.schedule import ClockedScheduler


class StagedTraining:
    """What is trained when: parameter groups, optimizers and schedules of the stages, and sub-stages."""

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable tensor by group: ``lora`` first, then the methods' own."""
        adapter = list(self._adapter_parameters.values())
        return {**({LORA_GROUP: adapter} if adapter else {}), **self.methods.parameter_groups()}

    @property
    def named_trainable(self) -> dict[str, nn.Parameter]:
        return {**self._adapter_parameters, **dict(self.methods.named_parameters())}

    def _apply_stage(self) -> None:
        """Freeze and thaw for the current stage."""
        assert self.curriculum is not None
        self.curriculum.apply(self.groups)
        self._measure_backward()

    def _measure_backward(self) -> None:
        """What trains now and how deep its gradient goes, for the FLOP accounts."""
        trainable = sum(p.numel() for p in self.named_trainable.values() if p.requires_grad)
        self.backward_share = self._backward_share()
        self.sizes = trainable, trainable < sum(p.numel() for p in self.anatomy.model.parameters()) / 2

    def _backward_share(self) -> float:
        """Share of the blocks that this stage's backward passes: it ends below the lowest tensor that trains."""
        place = {
            id(p): block for block, module in enumerate(self.anatomy.blocks) for p in module.parameters()
        }
        lowest = [place.get(id(p), 0) for p in self._adapter_parameters.values() if p.requires_grad]
        lowest += self.methods.lowest_blocks()
        return (self.anatomy.num_blocks - min(lowest, default=0)) / self.anatomy.num_blocks

    def plan_stages(self, max_steps: int) -> Curriculum:
        """The curriculum of this run, checked: groups, lengths, and what each method needs of the run."""
        stages = self._given_stages or self.methods.stages(self.args.learning_rate)
        if LORA_GROUP not in self.groups:
            stages = [
                s.model_copy(update={"train": {g: lr for g, lr in s.train.items() if g != LORA_GROUP}})
                for s in stages
            ]
        curriculum = Curriculum(stages, max_steps)
        curriculum.check_groups(self.groups)
        self.methods.check_run(max_steps)
        return curriculum

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        self.curriculum = self.plan_stages(max_steps)
        self.curriculum.index = self._resume_stage
        if len(self.curriculum.scheduled) > 1 and self.optimizer is not None:
            raise ConfigError("a run of several stages makes its own optimizers: do not pass optimizers=")
        if resume_from_checkpoint is None:  # a resumed run stands inside a stage that has begun
            self.methods.on_stage_start(self.curriculum.current, self._probe())
        self._apply_stage()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        replicas.broadcast([*self.named_trainable.values(), *self.methods.buffers()])
        return prepared

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.curriculum is not None:
            decayed = set(self.get_decay_parameter_names(self.model))
            no_decay = {id(p) for n, p in self._adapter_parameters.items() if n not in decayed}
            groups = self.curriculum.optimizer_groups(self.groups, no_decay, self.args.weight_decay)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and self.curriculum is not None:
            scheduled = self.curriculum.current
            warmup = scheduled.stage.warmup
            inner = get_scheduler(
                scheduled.stage.lr_scheduler or self.args.lr_scheduler_type,
                optimizer=self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=self.args.get_warmup_steps(scheduled.steps)
                if warmup is None
                else round(warmup * scheduled.steps),
                num_training_steps=scheduled.steps,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )
            self.lr_scheduler = ClockedScheduler(inner, self._clock_ticks)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _tell_where_the_schedule_ended(self) -> None:
        """On the accepted clock a schedule ends early: its last rate is then no small one, which nobody would guess."""
        if self.schedule_clock != "accepted" or self.curriculum is None or self.lr_scheduler is None:
            return
        planned, taken = self.curriculum.current.steps, self.lr_scheduler.ticks_taken
        peaks = self.lr_scheduler.inner.base_lrs
        if taken < planned and peaks and max(peaks) > 0:
            share = max(self.lr_scheduler.get_last_lr()) / max(peaks)
            warnings.warn(
                f"schedule_clock: accepted: the schedule stands at {taken} of {planned} steps, since the other windows "
                f"accepted nothing; training ends at {share:.0%} of the peak learning rate, without its decay. "
                "schedule_clock: offered decays over the whole run",
                stacklevel=2,
            )

    def _clock_ticks(self) -> bool:
        return self.schedule_clock == "offered" or self.window.accepted > 0

    def _advance_stage(self) -> None:
        """At a step boundary: the next stage's groups, a fresh optimizer and schedule."""
        assert self.curriculum is not None
        self.curriculum.index += 1
        replicas.broadcast(list(self.methods.buffers()))  # what a stage grows from is the same on every rank
        self.methods.on_stage_start(self.curriculum.current, self._probe())
        self._apply_stage()
        self.optimizer, self.lr_scheduler = None, None
        self.accelerator._optimizers.clear()
        self.optimizer = self.accelerator.prepare(self.create_optimizer())
        self.create_scheduler(self.curriculum.current.steps)
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler

    def _begin_substage(self, reason: str) -> None:
        """The parameter set changed inside a stage: survivors keep their AdamW state, the schedule goes on."""
        assert self.curriculum is not None
        replicas.broadcast(
            [*self.named_trainable.values(), *self.methods.buffers()]
        )  # what has grown is the same
        old_state = dict(self.optimizer.state)
        old_schedule = self.lr_scheduler.state_dict()
        self._apply_stage()
        self.optimizer, self.lr_scheduler = None, None
        self.accelerator._optimizers.clear()
        self.optimizer = self.accelerator.prepare(self.create_optimizer())
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in old_state:
                    self.optimizer.state[parameter] = old_state[parameter]
        self.create_scheduler(self.curriculum.current.steps)
        self.lr_scheduler.continue_from(old_schedule)
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler
        self.log({"stage": f"{self.curriculum.current.name}: {reason}"})

    def _probe(self) -> Any:
        """A few collated batches of the current stage's data, for methods that look before they grow."""
        return _Probe(self)


class _Probe:
    """Iterates over collated batches of the current stage's data without moving the training order."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __iter__(self) -> Any:
        trainer = self._trainer
        dataset = trainer.stage_dataset(trainer.curriculum.current)
        order = torch.randperm(
            len(dataset), generator=torch.Generator().manual_seed(trainer.args.seed)
        ).tolist()
        size = trainer.args.per_device_train_batch_size
        for start in range(0, len(order), size):
            rows = [dataset[i] for i in order[start : start + size]]
            yield trainer._prepare_inputs(trainer.data_collator(rows))
