"""One micro-batch inside a transformers.Trainer: votes, forward, auxiliary losses, the decision, the accounts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.step import ForwardStopped, Step
from headgate.models.anatomy import MODEL_INPUTS
from headgate.models.surgery import head_input_captured, on_block_output
from headgate.ops.randomness import derive_seed, seed_device
from headgate.training import processes, replicas
from headgate.training.checks import require_gradients
from headgate.training.counted import CountedTraining, Window
from headgate.training.loss import TaskLoss, chunked_loss, plain_loss, trained_tokens
from headgate.training.telemetry import gradient_norms


class GatedTraining(CountedTraining):
    """The training step: ask the methods, run what they agree to run, count what was really computed."""

    def _begin_window(self) -> None:
        assert self.curriculum is not None
        if self.curriculum.is_over(self.state.global_step):
            self._advance_stage()
        elif (reason := self.methods.substage(self.window.last)) is not None:
            self._begin_substage(reason)
        for parameter in self.methods.parameters():
            parameter.grad = None
        self.window = Window(step=self.state.global_step)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.stopwatch.start()
        if self.window.step != self.state.global_step:
            self._begin_window()
        assert self.curriculum is not None
        model.train()
        self.methods.train()
        inputs = self._prepare_inputs(inputs)
        window = self.window
        step = Step(
            batch=inputs,
            scheduled=self.curriculum.current,
            global_step=self.state.global_step,
            micro_step=self.micro_step * processes.world_size() + processes.rank(),
            seed=self.args.seed,
            max_steps=self.state.max_steps,
            model=model,
            window_index=window.index,
            window_size=self.current_gradient_accumulation_steps,
            epoch=float(self.state.epoch or 0.0) if self.batches is None else self.batches.epoch,
            num_tokens=trained_tokens(inputs["labels"]),
            window_tokens=num_items_in_batch,
            should_log=self._will_log(),
            sum_across_ranks=replicas.sum_across_ranks,
        )
        seed_device(derive_seed(self.args.seed, step.micro_step, "dropout", 0), self.args.device)
        self.methods.on_step_start(step)
        step.accepted = self._decide(step)
        task = self._forward(step, num_items_in_batch) if step.accepted else None
        if task is not None:
            step.hidden, step.logits, step.outputs = task.hidden, task.logits, task.outputs
            step.raw_loss = task.loss.detach()
            step.task_loss = self._mean_loss(step.raw_loss, step)
            self.finite_watch.add_loss(step.task_loss, self.state.global_step, inputs)
            step.phase = "forward"
            step.accepted = self._decide(step)
        if task is not None and step.accepted:
            self._backward(step, task)
        reached = 1.0 if task is not None else self._reached(step)
        heads = 0 if task is None else 1 + (step.accepted and task.recomputes)
        task, step.phase = None, "done"
        self._count(step, reached, heads)
        if step.is_window_end:
            self._end_window(step)
        self.telemetry.add(self.methods.on_step_end(step))
        window.last = step
        window.index += 1
        self.micro_step += 1
        loss = step.task_loss if step.task_loss is not None else torch.zeros((), device=self.args.device)
        step.hidden = step.logits = step.outputs = None
        loss = loss / step.window_size
        self.summed_loss = self.summed_loss + loss.detach()
        return loss

    def _decide(self, step: Step) -> bool:
        vote = self.methods.vote(step)
        return True if vote is None else replicas.all_agree(vote)

    def _forward(self, step: Step, num_items: Any) -> TaskLoss | None:
        """The forward and the task loss; None when a method stopped it on the way (phase ``partial``)."""
        inputs = self.model_inputs(step.batch)
        if num_items is not None and self.model_accepts_loss_kwargs:
            inputs["num_items_in_batch"] = num_items
        handles = [
            on_block_output(self.anatomy.blocks[block], self._partial_vote(step))
            for block in self.methods.partial_blocks()
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
        if self.override is not None:
            return self._overridden_loss(step, num_items)
        if self.loss_choice == "plain":
            task = plain_loss(step.model, self.anatomy, inputs)
        else:
            observers = self.methods.head_observers(step)
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
            task.loss = task.loss * processes.world_size()
        return task

    def _overridden_loss(self, step: Step, num_items: Any) -> TaskLoss:
        """The loss of a trainer that computes its own, scaled as transformers.Trainer.training_step scales it."""
        own = {*self.methods.columns(), "segment_ids", "example_id"}
        inputs = {name: value for name, value in step.batch.items() if name not in own}
        with head_input_captured(self.anatomy.head) as captured:
            loss = self.compute_loss(step.model, inputs, num_items_in_batch=num_items)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ConfigError(
                f"{self.override} returned {type(loss).__name__}, not one loss: return a scalar tensor"
            )
        if not captured:
            reading = self.methods.reading_hidden
            if reading:
                raise ConfigError(
                    f"{reading[0]} reads what enters the language-model head, and {self.override} computes its loss "
                    "without calling the head: use HeadgateTrainer, or switch off what reads it (kd)"
                )
        by_tokens = num_items is not None and self.model_accepts_loss_kwargs
        if not by_tokens and self.compute_loss_func is None:
            loss = loss / step.window_size
        return TaskLoss(loss.reshape(()), captured[-1] if captured else None, None, None)

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
        scale = processes.world_size() if self.args.average_tokens_across_devices else 1
        return loss * step.window_tokens / (scale * torch.clamp(torch.as_tensor(step.num_tokens), min=1))

    def _backward(self, step: Step, task: TaskLoss) -> None:
        parts = self.methods.losses(step)
        total = self.methods.weighed(task.loss, step)
        for part in parts.values():
            total = total + part / step.window_size
        if total.requires_grad:
            self.accelerator.backward(total)
        self.telemetry.add({f"loss/{name}": part for name, part in parts.items()})

    def _end_window(self, step: Step) -> None:
        """Reduce over ranks, renormalise by what was accepted, check and measure the gradients."""
        assert self.curriculum is not None
        window = self.window
        if processes.world_size() > 1:
            self._join_ranks(window)
        if window.accepted:
            factor = window.share_correction()
            self.telemetry.add({"loss": window.loss * factor})
            if window.accepted < window.offered and self.methods.renormalizes:
                for parameter in self.named_trainable.values():
                    if parameter.grad is not None:
                        parameter.grad *= factor
            if self._checked_stage != self.curriculum.index and not self.methods.skips_blocks:
                require_gradients(self.named_trainable, self.curriculum.current.name)
            self._checked_stage = self.curriculum.index
        if step.should_log:
            self.telemetry.add(gradient_norms(self.groups))
            for group in self.optimizer.param_groups:
                self.telemetry.set(f"learning_rate/{group['name']}", float(group["lr"]))

    def _join_ranks(self, window: Window) -> None:
        """One message at each optimizer step: who was told to stop, what was accepted, which tensors have gradients."""
        parameters = list(self.named_trainable.values())
        present = [float(p.grad is not None) for p in parameters]
        mine = [float(self.signals.pending), float(window.tokens), float(window.accepted_tokens), *present]
        stop, window.tokens, window.accepted_tokens, *present = processes.exchange(mine)
        self.signals.agreed |= stop > 0
        replicas.average_gradients([p for p, there in zip(parameters, present, strict=True) if there])

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

    def _clip_grad_norm(self, model: Any) -> Any:
        return self._clipped(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once before every optimizer step: a gradient that is not finite goes no further."""
        if grad_norm is None:
            grad_norm = self._clipped(model, float("inf"))
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = getattr(self.accelerator, "scaler", None)
        if norm is not None and (
            scaler is None or not scaler.is_enabled()
        ):  # fp16's scaler skips such steps itself
            self.finite_watch.add_gradient_norm(norm)
        return norm

    def _clipped(self, model: Any, most: float) -> Any:
        parameters = [*model.parameters(), *self.methods.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, most)
