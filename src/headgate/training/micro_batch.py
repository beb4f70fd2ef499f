"""One micro-batch inside a transformers.Trainer: votes, forward, auxiliary losses, the decision, the accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.methods.step import ForwardStopped, Step
from headgate.models.sharding import forward_was_stopped
from headgate.models.surgery import on_block_output
from headgate.training import processes, replicas
from headgate.training.counted import executed_flops, reached_share
from headgate.training.loss import TaskLoss

if TYPE_CHECKING:
    from headgate.training.mixin import MethodsMixin


class MicroBatch:
    """Asks the methods, runs what they agree to run, counts what was really computed.

    It changes its ``step``, the gradients, and the trainer's run state, window and telemetry; nothing else.
    """

    def __init__(self, trainer: MethodsMixin, step: Step) -> None:
        self._trainer, self.step = trainer, step

    def run(self) -> None:
        """From the first vote to the accounts."""
        step = self.step
        self._trainer.methods.on_step_start(step)
        step.accepted = self._decide()
        task = self._forward() if step.accepted else None
        if task is not None:
            self._show(task)
            step.phase = "forward"
            step.accepted = self._decide()
        if task is not None and step.accepted:
            self._backward(task)
        reached = (
            1.0 if task is not None else reached_share(step, self._trainer.methods, self._trainer.anatomy)
        )
        heads = 0 if task is None else 1 + (step.accepted and task.recomputes)
        step.phase = "done"
        self._count(reached, heads)

    def _decide(self) -> bool:
        vote = self._trainer.methods.vote(self.step)
        return True if vote is None else replicas.all_agree(vote)

    def _show(self, task: TaskLoss) -> None:
        """What the methods may see of the forward."""
        step = self.step
        step.hidden, step.logits, step.outputs = task.hidden, task.logits, task.outputs
        step.raw_loss = task.loss.detach()
        step.task_loss = self._mean(step.raw_loss)
        self._trainer.finite_watch.add_loss(step.task_loss, step.global_step, step.batch)

    def _forward(self) -> TaskLoss | None:
        """The forward and the task loss; None when a method stopped it on the way (phase ``partial``)."""
        trainer, step = self._trainer, self.step
        blocks = [trainer.anatomy.blocks[index] for index in trainer.methods.partial_blocks()]
        handles = [on_block_output(block, self._vote_at_block) for block in blocks]
        try:
            with trainer.compute_loss_context_manager():
                task: TaskLoss = trainer.task_objective.task_loss(step)
        except ForwardStopped:
            forward_was_stopped(trainer.anatomy.model)
            step.accepted = False
            return None
        finally:
            for handle in handles:
                handle.remove()
        return task

    def _vote_at_block(self, hidden: Tensor) -> Tensor:
        step = self.step
        if step.phase == "batch":
            step.phase, step.hidden = "partial", hidden.detach()
            if not self._decide():
                raise ForwardStopped
        return hidden

    def _mean(self, loss: Tensor) -> Tensor:
        """The mean over this micro-batch's trained tokens, whatever it was divided by for the backward."""
        step = self.step
        if step.window_tokens is None:
            return loss * step.window_size
        scale = processes.world_size() if self._trainer.args.average_tokens_across_devices else 1
        return loss * step.window_tokens / (scale * torch.clamp(torch.as_tensor(step.num_tokens), min=1))

    def _backward(self, task: TaskLoss) -> None:
        trainer, step = self._trainer, self.step
        parts = trainer.methods.losses(step)
        total = trainer.methods.weighed(task.loss, step)
        for part in parts.values():
            total = total + part / step.window_size
        if total.requires_grad:
            trainer.accelerator.backward(total)
        trainer.telemetry.add({f"loss/{name}": part for name, part in parts.items()})

    def _count(self, reached: float, heads: int) -> None:
        trainer, step, run = self._trainer, self.step, self._trainer.run_state
        trainer.window.count(step)
        if step.accepted:
            run.trained_tokens = run.trained_tokens + step.num_tokens
        if step.task_loss is not None:
            trainer.telemetry.add({"loss_all": step.task_loss})
        run.flops = run.flops + executed_flops(
            step, trainer.methods, trainer.anatomy, trainer.stages, reached, heads
        )
        trainer.telemetry.add({"padding_fraction": 1 - step.valid.float().mean()})
