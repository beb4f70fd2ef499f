"""Stages inside a transformers.Trainer: what trains now, with which optimizer and schedule, swapped at step boundaries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import get_scheduler

from headgate.errors import ConfigError
from headgate.methods.stage import LORA_GROUP, Stage
from headgate.methods.step import Step
from headgate.models import private
from headgate.models.anatomy import Batch
from headgate.training import processes, replicas
from headgate.training.config import ScheduleClock
from headgate.training.curriculum import Curriculum
from headgate.training.schedule import ClockedScheduler

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from headgate.training.mixin import MethodsMixin


class Stages:
    """The curriculum of a trainer and the parameters that it freezes and thaws.

    Attributes:
        curriculum: None before training. first: the stage that a resumed run stands in.
        trainable: parameters that train now. base_is_mostly_frozen: whether they are less than half of the model's.
        backward_share: share of the blocks that the backward passes.
    """

    def __init__(
        self,
        trainer: MethodsMixin,
        adapter: Mapping[str, nn.Parameter],
        given: Sequence[Stage] | None,
        clock: ScheduleClock,
    ) -> None:
        self._trainer, self._adapter, self._clock = trainer, adapter, clock
        self._given = list(given) if given is not None else None
        self.curriculum: Curriculum | None = None
        self.first, self._ended = 0, -1
        self.trainable, self.base_is_mostly_frozen, self.backward_share = 0, True, 1.0

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable tensor by group: ``lora`` first, then the methods' own."""
        adapter = list(self._adapter.values())
        return {**({LORA_GROUP: adapter} if adapter else {}), **self._trainer.methods.parameter_groups()}

    @property
    def named_trainable(self) -> dict[str, nn.Parameter]:
        return {**self._adapter, **dict(self._trainer.methods.named_parameters())}

    def plan(self, max_steps: int) -> Curriculum:
        """The curriculum of this run, checked: groups, lengths, and what each method needs of the run."""
        methods, groups = self._trainer.methods, self.groups
        stages = self._given or methods.stages(self._trainer.args.learning_rate)
        if LORA_GROUP not in groups:
            stages = [
                s.model_copy(update={"train": {g: lr for g, lr in s.train.items() if g != LORA_GROUP}})
                for s in stages
            ]
        curriculum = Curriculum(stages, max_steps)
        curriculum.check_groups(groups)
        methods.check_run(max_steps)
        return curriculum

    # -- where the run stands -------------------------------------------------------------------------
    def begin(self, max_steps: int, resumed: bool) -> None:
        """Before the trainer makes its optimizer."""
        self.curriculum = self.plan(max_steps)
        self.curriculum.index, self._ended = self.first, -1
        if len(self.curriculum.scheduled) > 1 and self._trainer.optimizer is not None:
            raise ConfigError("a run of several stages makes its own optimizers: do not pass optimizers=")
        if not resumed:  # a resumed run stands inside a stage that has begun
            self._trainer.methods.on_stage_start(self.curriculum.current, Probe(self._trainer))
        self._apply()

    def move_on(self, last: Step | None) -> None:
        """At a step boundary: the next stage, or a sub-stage where a method changes its parameters now."""
        assert self.curriculum is not None
        if self.curriculum.is_over(self._trainer.state.global_step):
            self._advance(self.curriculum)
        elif (reason := self._trainer.methods.substage(last)) is not None:
            self._begin_substage(self.curriculum, reason)

    def end_what_is_over(self) -> None:
        """After an optimizer step: where it was a stage's last, the methods have the last word before it is validated."""
        curriculum = self.curriculum
        assert curriculum is not None
        if self._ended != curriculum.index and self._trainer.state.global_step >= curriculum.current.stop:
            self._ended = curriculum.index
            self._trainer.methods.on_stage_end(curriculum.current)

    def _advance(self, curriculum: Curriculum) -> None:
        """The next stage's groups, a fresh optimizer and schedule."""
        trainer = self._trainer
        curriculum.index += 1
        replicas.broadcast(
            list(trainer.methods.buffers())
        )  # what a stage grows from is the same on every rank
        trainer.methods.on_stage_start(curriculum.current, Probe(trainer))
        self._apply()
        trainer.renew_optimizer()

    def _begin_substage(self, curriculum: Curriculum, reason: str) -> None:
        """The parameter set changed inside a stage: survivors keep their AdamW state, the schedule goes on."""
        trainer = self._trainer
        # what has grown is the same on every rank
        replicas.broadcast([*self.named_trainable.values(), *trainer.methods.buffers()])
        old_state, ticks = dict(trainer.optimizer.state), trainer.lr_scheduler.ticks_taken
        self._apply()
        trainer.renew_optimizer()
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in old_state:
                    trainer.optimizer.state[parameter] = old_state[parameter]
        trainer.lr_scheduler.continue_from(ticks)
        trainer.log({"stage": f"{curriculum.current.name}: {reason}"})

    # -- what trains ----------------------------------------------------------------------------------
    def _apply(self) -> None:
        """Freeze and thaw for the current stage."""
        assert self.curriculum is not None
        self.curriculum.apply(self.groups)
        self.measure_backward()

    def measure_backward(self) -> None:
        """What trains now and how deep its gradient goes, for the FLOP accounts."""
        anatomy = self._trainer.anatomy
        self.trainable = sum(p.numel() for p in self.named_trainable.values() if p.requires_grad)
        self.base_is_mostly_frozen = self.trainable < sum(p.numel() for p in anatomy.model.parameters()) / 2
        place = {id(p): block for block, module in enumerate(anatomy.blocks) for p in module.parameters()}
        lowest = [place.get(id(p), 0) for p in self._adapter.values() if p.requires_grad]
        lowest += self._trainer.methods.lowest_blocks()
        # a backward ends below the lowest tensor that trains
        self.backward_share = (anatomy.num_blocks - min(lowest, default=0)) / anatomy.num_blocks

    # -- optimizer and schedule -----------------------------------------------------------------------
    def make_optimizer(self) -> Optimizer:
        """AdamW, or what the arguments name, over the groups of the current stage."""
        trainer = self._trainer
        assert self.curriculum is not None
        decayed = set(trainer.get_decay_parameter_names(trainer.model))
        no_decay = {id(p) for n, p in self._adapter.items() if n not in decayed}
        groups = self.curriculum.optimizer_groups(self.groups, no_decay, trainer.args.weight_decay)
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        return kind(groups, **options)

    def make_scheduler(self, optimizer: Optimizer) -> ClockedScheduler:
        """The schedule of the current stage, over its own steps."""
        args = self._trainer.args
        assert self.curriculum is not None
        scheduled = self.curriculum.current
        warmup = scheduled.stage.warmup
        inner = get_scheduler(
            scheduled.stage.lr_scheduler or args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(scheduled.steps)
            if warmup is None
            else round(warmup * scheduled.steps),
            num_training_steps=scheduled.steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        return ClockedScheduler(inner, self._clock_ticks)

    def _clock_ticks(self) -> bool:
        return self._clock == "offered" or self._trainer.window.accepted > 0

    def tell_where_the_schedule_ended(self) -> None:
        """On the accepted clock a schedule ends early: its last rate is then no small one, which nobody would guess."""
        schedule = self._trainer.lr_scheduler
        if self._clock != "accepted" or self.curriculum is None or schedule is None:
            return
        planned, taken = self.curriculum.current.steps, schedule.ticks_taken
        peaks = schedule.inner.base_lrs
        if taken < planned and peaks and max(peaks) > 0:
            share = max(schedule.get_last_lr()) / max(peaks)
            warnings.warn(
                f"schedule_clock: accepted: the schedule stands at {taken} of {planned} steps, since the other windows "
                f"accepted nothing; training ends at {share:.0%} of the peak learning rate, without its decay. "
                "schedule_clock: offered decays over the whole run",
                stacklevel=3,
            )


class Probe:
    """Iterates over collated batches of the current stage's data without moving the training order.

    Every rank sees the same ones, as large as all ranks' together: what a method learns from so many batches, and which
    rows it keeps, is then what one process with the same global batch does. No graph is kept of them.

    ``validation``: the batches that a validation of the whole run reads, anew every time it is asked for; None where there
    is no such one (no validation rows, or one set for each skill).
    """

    def __init__(self, trainer: MethodsMixin) -> None:
        self._trainer = trainer

    @property
    def validation(self) -> Iterator[Batch] | None:
        held = self._trainer.eval_dataset
        batches: Iterator[Batch] | None = (
            None if held is None or isinstance(held, dict) else self._trainer.validation_batches(held)
        )
        return batches

    def __iter__(self) -> Iterator[Batch]:
        trainer = self._trainer
        assert trainer.curriculum is not None
        dataset = trainer.stage_dataset(trainer.curriculum.current)
        order = torch.randperm(
            len(dataset), generator=torch.Generator().manual_seed(trainer.args.seed)
        ).tolist()
        size = trainer.args.per_device_train_batch_size * processes.world_size()
        for start in range(0, len(order), size):
            rows = [dataset[i] for i in order[start : start + size]]
            yield private.inputs_on_device(trainer, trainer.data_collator(rows))
