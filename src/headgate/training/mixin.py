"""MethodsMixin: the methods inside any transformers.Trainer.

The trainer's own loop, precision, accumulation and logging stay as they are. What is overridden: the
training step (votes, auxiliary losses, the decision), the optimizer and schedule (one per stage), the
gradient reduction between replicas, and checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.compose import LORA_GROUP, MethodStack
from headgate.methods.stage import Stage
from headgate.methods.step import ForwardStopped, Step
from headgate.models.anatomy import describe
from headgate.models.surgery import on_block_output
from headgate.ops.randomness import derive_seed
from headgate.training import checkpoint, replicas
from headgate.training.accounting import Stopwatch, backward_flops, forward_flops, peak_memory_bytes
from headgate.training.checks import NanWatch, require_gradients
from headgate.training.config import LossChoice, ScheduleClock
from headgate.training.curriculum import Curriculum
from headgate.training.loss import TaskLoss, choose_loss, chunked_loss, plain_loss, trained_tokens
from headgate.training.schedule import ClockedScheduler
from headgate.training.telemetry import Telemetry, gradient_norms


class MethodsMixin:
    """Put before a transformers.Trainer: ``class MyTrainer(MethodsMixin, SFTTrainer)``.

    Args (besides the trainer's own):
        methods: what routes and gates; attached here, detached by ``detach_methods``.
        stages: a curriculum; None takes the methods' own, or one stage over ``args.learning_rate``.
        loss: ``auto``, ``plain`` (the model's own) or ``chunked`` (no [B, T, V] logits).
        label_smoothing: of the chunked loss.
        schedule_clock: whether a window in which nothing was accepted advances the schedule (``offered``).
    """

    def __init__(
        self,
        *args: Any,
        methods: Sequence[Method] = (),
        stages: Sequence[Stage] | None = None,
        loss: LossChoice = "auto",
        label_smoothing: float = 0.0,
        schedule_clock: ScheduleClock = "offered",
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, nn.Module):
            raise ConfigError("HeadgateTrainer needs a loaded model: pass model=...")
        self.methods = MethodStack(methods)
        self.anatomy = describe(model)
        self._adapter_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for method in self.methods:
            method.seed = method.seed or _seed_of(args, kwargs)
        self.methods.attach(self.anatomy)
        super().__init__(*args, **kwargs)
        trainer_args: Any = self.args  # type: ignore[has-type]
        if trainer_args.label_smoothing_factor:
            raise ConfigError("use HeadgateTrainer(label_smoothing=...) instead of label_smoothing_factor")
        self.methods.to(trainer_args.device)
        self.loss_choice = choose_loss(loss, self.anatomy, label_smoothing)
        self.label_smoothing, self.schedule_clock = label_smoothing, schedule_clock
        self._given_stages = list(stages) if stages is not None else None
        self.curriculum: Curriculum | None = None
        self.telemetry, self.stopwatch = Telemetry(), Stopwatch()
        self.nan_watch = NanWatch(trainer_args.output_dir)
        self.micro_step, self.trained_tokens, self.flops = 0, 0.0, 0.0
        self._window: dict[str, Any] = {"step": -1}
        self._checked_stage = -1
        self._resume_stage = 0
        replicas.take_over_reduction(self.accelerator)  # type: ignore[attr-defined]

    # -- parameters, stages, optimizer -------------------------------------------------------------------
    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable tensor by group: ``lora`` first, then the methods' own."""
        adapter = list(self._adapter_parameters.values())
        return {**({LORA_GROUP: adapter} if adapter else {}), **self.methods.parameter_groups()}

    @property
    def named_trainable(self) -> dict[str, nn.Parameter]:
        return {**self._adapter_parameters, **dict(self.methods.named_parameters())}

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
        for method in self.methods:
            method.check_run(max_steps)
        return curriculum

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        self.curriculum = self.plan_stages(max_steps)
        self.curriculum.index = self._resume_stage
        if len(self.curriculum.scheduled) > 1 and self.optimizer is not None:
            raise ConfigError("a run of several stages makes its own optimizers: do not pass optimizers=")
        self.curriculum.apply(self.groups)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        replicas.broadcast(list(self.named_trainable.values()))
        self.methods.on_stage_start(self.curriculum.current, self._probe())
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

    def _clock_ticks(self) -> bool:
        return self.schedule_clock == "offered" or self._window["accepted"] > 0

    def _advance_stage(self) -> None:
        """At a step boundary: the next stage's groups, a fresh optimizer and schedule."""
        assert self.curriculum is not None
        self.curriculum.index += 1
        self.curriculum.apply(self.groups)
        self.optimizer, self.lr_scheduler = None, None
        self.accelerator._optimizers.clear()
        self.optimizer = self.accelerator.prepare(self.create_optimizer())
        self.create_scheduler(self.curriculum.current.steps)
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler
        self.methods.on_stage_start(self.curriculum.current, self._probe())

    def _begin_substage(self, reason: str) -> None:
        """The parameter set changed inside a stage: survivors keep their AdamW state, the schedule goes on."""
        assert self.curriculum is not None
        old_state = dict(self.optimizer.state)
        old_schedule = self.lr_scheduler.state_dict()
        self.curriculum.apply(self.groups)
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

    # -- one micro-batch ---------------------------------------------------------------------------------
    def _begin_window(self, num_items: Any) -> None:
        assert self.curriculum is not None
        if self.curriculum.is_over(self.state.global_step):
            self._advance_stage()
        elif (reason := self._substage_reason()) is not None:
            self._begin_substage(reason)
        for parameter in self.methods.parameters():
            parameter.grad = None
        self._window = {
            "step": self.state.global_step,
            "index": 0,
            "items": num_items,
            "offered": 0,
            "accepted": 0,
            "accepted_tokens": 0,
            "tokens": 0,
            "loss": 0.0,
        }

    def _substage_reason(self) -> str | None:
        last = self._window.get("last_step")
        if last is None:
            return None
        reasons = [reason for method in self.methods if (reason := method.substage(last)) is not None]
        return "; ".join(reasons) or None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.stopwatch.start()
        if self._window["step"] != self.state.global_step:
            self._begin_window(num_items_in_batch)
        assert self.curriculum is not None
        model.train()
        self.methods.train()
        inputs = self._prepare_inputs(inputs)
        window = self._window
        step = Step(
            batch=inputs,
            scheduled=self.curriculum.current,
            global_step=self.state.global_step,
            micro_step=self.micro_step,
            seed=self.args.seed,
            max_steps=self.state.max_steps,
            model=model,
            window_index=window["index"],
            window_size=self.current_gradient_accumulation_steps,
            epoch=float(self.state.epoch or 0.0),
            num_tokens=trained_tokens(inputs["labels"]),
            window_tokens=num_items_in_batch,
            should_log=self._will_log(),
            sum_across_ranks=replicas.sum_across_ranks,
        )
        torch.manual_seed(derive_seed(self.args.seed, self.micro_step, "dropout", self.args.process_index))
        self.methods.on_step_start(step)
        step.accepted = self._decide(step)
        task = self._forward(step, num_items_in_batch) if step.accepted else None
        if task is not None:
            step.hidden, step.logits, step.outputs = task.hidden, task.logits, task.outputs
            step.raw_loss = task.loss.detach()
            step.task_loss = self._mean_loss(step.raw_loss, step)
            self.nan_watch.add(step.task_loss, self.state.global_step, inputs)
            step.phase = "forward"
            step.accepted = self._decide(step)
        if task is not None and step.accepted:
            self._backward(step, task)
        forwarded, task = task is not None, None
        step.phase = "done"
        self._count(step, forwarded)
        if step.is_window_end:
            self._end_window(step)
        self.telemetry.add(self.methods.on_step_end(step))
        window["last_step"] = step
        window["index"] += 1
        self.micro_step += 1
        loss = step.task_loss if step.task_loss is not None else torch.zeros((), device=self.args.device)
        step.hidden = step.logits = step.outputs = None
        return loss / step.window_size

    def _decide(self, step: Step) -> bool:
        vote = self.methods.vote(step)
        return True if vote is None else replicas.all_agree(vote)

    def _forward(self, step: Step, num_items: Any) -> TaskLoss | None:
        """The forward and the task loss; None when a method stopped it on the way (phase ``partial``)."""
        inputs = self.model_inputs(step.batch)
        if num_items is not None and self.model_accepts_loss_kwargs:
            inputs["num_items_in_batch"] = num_items
        handles = [
            on_block_output(self.anatomy.blocks[m.partial_block], self._partial_vote(step))
            for m in self.methods
            if m.partial_block is not None
        ]
        try:
            with self.compute_loss_context_manager():
                task = self._task_loss(step, inputs, num_items)
        except ForwardStopped:
            step.accepted = False
            return None
        finally:
            for handle in handles:
                handle.remove()
        return task

    def _task_loss(self, step: Step, inputs: dict[str, Any], num_items: Any) -> TaskLoss:
        if self.loss_choice == "plain":
            task = plain_loss(step.model, self.anatomy, inputs)
        else:
            observers = tuple(o for m in self.methods if (o := m.head_observer(step)) is not None)
            task = chunked_loss(
                step.model,
                self.anatomy,
                inputs,
                num_items=num_items,
                label_smoothing=self.label_smoothing,
                observers=observers,
                gated=bool(observers),
            )
        if num_items is None:
            task.loss = task.loss / step.window_size
        elif self.args.average_tokens_across_devices:
            task.loss = task.loss * replicas.world_size()
        return task

    def _partial_vote(self, step: Step) -> Any:
        def observe(hidden: Tensor) -> Tensor:
            if step.phase == "batch":
                step.phase, step.hidden = "partial", hidden.detach()
                if not self._decide(step):
                    raise ForwardStopped
            return hidden

        return observe

    def _mean_loss(self, loss: Tensor, step: Step) -> Tensor:
        """The mean over this micro-batch's trained tokens, whatever it was divided by for the backward."""
        if step.window_tokens is None:
            return loss * step.window_size
        scale = replicas.world_size() if self.args.average_tokens_across_devices else 1
        return loss * step.window_tokens / (scale * torch.clamp(torch.as_tensor(step.num_tokens), min=1))

    def _backward(self, step: Step, task: TaskLoss) -> None:
        parts = self.methods.losses(step)
        total = task.loss
        for method in self.methods:
            weight = method.loss_weight(step)
            if isinstance(weight, Tensor) or weight != 1.0:
                total = total * weight
        for part in parts.values():
            total = total + part / step.window_size
        if total.requires_grad:
            self.accelerator.backward(total)
        self.telemetry.add({f"loss/{name}": part for name, part in parts.items()})

    def _count(self, step: Step, forwarded: bool) -> None:
        window = self._window
        tokens = step.num_tokens
        window["offered"] += 1
        window["tokens"] = window["tokens"] + tokens
        if step.accepted:
            window["accepted"] += 1
            window["accepted_tokens"] = window["accepted_tokens"] + tokens
            self.trained_tokens = self.trained_tokens + tokens
            window["loss"] = window["loss"] + step.raw_loss
        if step.task_loss is not None:
            self.telemetry.add({"loss_all": step.task_loss})
        self.flops = self.flops + self._flops(step, forwarded)
        valid = step.valid
        self.telemetry.add({"padding_fraction": 1 - valid.float().mean()})

    def _flops(self, step: Step, forwarded: bool) -> Tensor | float:
        """Executed FLOPs of this micro-batch on real tokens."""
        if not forwarded:
            return 0.0
        lengths = step.valid.sum(-1).float()
        if step.segment_ids is not None:
            ids = step.segment_ids[step.segment_ids >= 0]
            lengths = torch.bincount(ids).float()
        share = 1.0
        for method in self.methods:
            share = share * method.executed_share(step)
        forward = forward_flops(self.anatomy, lengths.sum(), (lengths * (lengths + 1) / 2).sum(), share)
        if not step.accepted:
            return forward
        trainable = sum(p.numel() for p in self.named_trainable.values() if p.requires_grad)
        frozen = trainable < sum(p.numel() for p in self.anatomy.model.parameters()) / 2
        return forward + backward_flops(forward, lengths.sum(), trainable, frozen)

    def _end_window(self, step: Step) -> None:
        """Reduce over ranks, renormalise by what was accepted, check and measure the gradients."""
        assert self.curriculum is not None
        window, parameters = self._window, list(self.named_trainable.values())
        if window["accepted"]:
            replicas.average_gradients(parameters)
            factor: Tensor | float = 1.0
            if window["accepted"] < window["offered"]:
                factor = window["tokens"] / torch.clamp(torch.as_tensor(window["accepted_tokens"]), min=1)
            self.telemetry.add({"loss": window["loss"] * factor})
            if window["accepted"] < window["offered"] and self._renormalize:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad *= factor
            if self._checked_stage != self.curriculum.index and not any(m.skips_blocks for m in self.methods):
                require_gradients(self.named_trainable, self.curriculum.current.name)
            self._checked_stage = self.curriculum.index
        if step.should_log:
            self.telemetry.add(gradient_norms(self.groups))
            for group in self.optimizer.param_groups:
                self.telemetry.set(f"learning_rate/{group['name']}", float(group["lr"]))

    @property
    def _renormalize(self) -> bool:
        return all(getattr(method.config, "renormalize", True) for method in self.methods)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model itself is called with: the methods' extra columns are left out."""
        return {k: v for k, v in batch.items() if k in MODEL_INPUTS}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(
            model,
            self.model_inputs(inputs),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )

    def _will_log(self) -> bool:
        every = self.state.logging_steps or 1
        return (self.state.global_step + 1) % every == 0 or self.state.global_step == 0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = [*self.methods.columns(), "segment_ids", "position_ids", "example_id", "labels"]
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *extra]))

    def _clip_grad_norm(self, model: Any) -> Any:
        parameters = [*model.parameters(), *self.methods.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: Any) -> float:
        """FLOPs executed since the last call: skipped forwards, backwards and blocks are not counted."""
        total = float(self.flops)
        done, self._flops_reported = total - getattr(self, "_flops_reported", 0.0), total
        return done

    # -- logs and checkpoints ----------------------------------------------------------------------------
    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs and self.curriculum is not None:
            seconds = self.stopwatch.read()
            self.nan_watch.check()
            mine = self.telemetry.flush()
            logs = {**logs, **mine}
            if "loss" not in mine:
                logs.pop("loss")  # nothing was accepted since the last log: no loss rather than a zero
            scheduled = self.curriculum.current
            logs |= {
                "stage": scheduled.name,
                "stage_step": self.state.global_step - scheduled.start,
                "trained_tokens": float(self.trained_tokens),
                "tokens_per_second": float(self.trained_tokens) / max(seconds, 1e-9),
                "flops": float(self.flops),
                "memory_peak": peak_memory_bytes(),
            }
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.stopwatch.stop()
        self.methods.eval()
        return super().evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        checkpoint.save_methods(folder, self.methods, self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "base_model": getattr(self, "base_model_name", None) or self.anatomy.model.config._name_or_path,
            "stage_index": self.curriculum.index if self.curriculum is not None else 0,
            "counters": {
                "micro_step": self.micro_step,
                "trained_tokens": float(self.trained_tokens),
                "flops": float(self.flops),
                "seconds": self.stopwatch.read(),
            },
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.stopwatch.stop()
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        if self.args.should_save:
            run_dir = Path(self._get_output_dir(trial=trial))
            checkpoint.seal(run_dir / f"checkpoint-{self.state.global_step}")
            checkpoint.rotate(run_dir, keep, self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As transformers.Trainer.train; ``True`` resumes from the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            found = checkpoint.last_valid(self.args.output_dir, tell=self._tell)
            resume_from_checkpoint = str(found) if found is not None else None
        elif resume_from_checkpoint:
            checkpoint.require_valid(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _tell(self, message: str) -> None:
        import warnings

        warnings.warn(message, stacklevel=3)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        description = checkpoint.restore_methods(Path(resume_from_checkpoint), self.methods)
        counters = description["counters"]
        self._resume_stage = description["stage_index"]
        self.micro_step = counters["micro_step"]
        self.trained_tokens, self.flops = counters["trained_tokens"], counters["flops"]
        self._flops_reported = self.flops
        self.stopwatch.seconds = counters["seconds"]

    def summary(self) -> dict[str, Any]:
        """Final figures of the methods, for the run's result."""
        merged: dict[str, Any] = {}
        for method in self.methods:
            merged.update(method.summary())
        return merged

    def detach_methods(self) -> None:
        """Take every method out of the model."""
        self.methods.detach()


MODEL_INPUTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "labels", "inputs_embeds", "token_type_ids"}
)


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


def _seed_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
    return int(getattr(training_args, "seed", 0))
