"""The gradient accumulation window: what was offered and accepted in it, and what becomes of its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.methods.step import Step
from headgate.models.anatomy import Batch
from headgate.training import processes, replicas
from headgate.training.checks import require_gradients
from headgate.training.telemetry import gradient_norms

if TYPE_CHECKING:
    from headgate.training.mixin import MethodsMixin


@dataclass
class Window:
    """Counts of one window: micro-batches and trained tokens, offered and accepted. ``items``: what its loss is divided
    by."""

    step: int = -1
    index: int = 0
    offered: int = 0
    accepted: int = 0
    tokens: Tensor | float = 0
    accepted_tokens: Tensor | float = 0
    loss: Tensor | float = 0.0
    items: Tensor | int | None = None
    last: Step | None = None

    def count(self, step: Step) -> None:
        """Enter a decided micro-batch."""
        self.offered += 1
        self.tokens = self.tokens + step.num_tokens
        if step.accepted:
            assert step.raw_loss is not None
            self.accepted += 1
            self.accepted_tokens = self.accepted_tokens + step.num_tokens
            self.loss = self.loss + step.raw_loss

    def share_correction(self) -> Tensor | float:
        """What a gradient divided by all offered tokens must be multiplied by."""
        if self.accepted == self.offered:
            return 1.0
        counts = torch.stack([torch.as_tensor(self.tokens), torch.as_tensor(self.accepted_tokens)]).float()
        return counts[0] / counts[1].clamp(min=1)


class Windows:
    """The window in progress of a trainer, opened and closed at optimizer steps."""

    def __init__(self, trainer: MethodsMixin) -> None:
        self._trainer = trainer
        self.current = Window()
        self._checked_stage = -1
        self._batches: Sequence[Batch] = ()
        self._items: Tensor | int | None = None

    def offer(self, batches: Sequence[Mapping[str, Tensor]], items: Tensor | int | None) -> None:
        """The micro-batches of the next window and the trained tokens that transformers counted in them."""
        self._batches, self._items = batches, items

    def _without_held_out(self) -> Tensor | int | None:
        """Those tokens without what the methods take out. Counted once the window's stage has begun: it may bring rows
        that are taken out."""
        items, held = self._items, self._trainer.methods.held_out_tokens
        out: Tensor | int = sum(held(batch) for batch in self._batches)
        self._batches = ()
        if items is None or not self._trainer.methods.holding_out:
            return items
        if self._trainer.args.average_tokens_across_devices:
            out = replicas.sum_across_ranks(torch.tensor(float(out), device=self._trainer.args.device))
        return torch.clamp(torch.as_tensor(items) - torch.as_tensor(out).long(), min=1)

    def open(self) -> None:
        """At the first micro-batch of an optimizer step: the stage that it belongs to, no gradients, new counts."""
        trainer = self._trainer
        if self.current.step == trainer.state.global_step:
            return
        trainer.stages.move_on(self.current.last)
        for parameter in trainer.methods.parameters():
            parameter.grad = None
        self.current = Window(step=trainer.state.global_step, items=self._without_held_out())

    def close(self, step: Step) -> None:
        """Reduce over ranks, renormalise by what was accepted, check and measure the gradients."""
        trainer, window, stages = self._trainer, self.current, self._trainer.stages
        if processes.world_size() > 1:
            self._join_ranks(window)
        if window.accepted:
            factor = window.share_correction()
            trainer.telemetry.add({"loss": window.loss * factor})
            if window.accepted < window.offered and trainer.methods.renormalizes:
                for parameter in stages.named_trainable.values():
                    if parameter.grad is not None:
                        parameter.grad *= factor
            curriculum = stages.curriculum
            assert curriculum is not None
            if self._checked_stage != curriculum.index and not trainer.methods.skips_blocks:
                require_gradients(stages.named_trainable, curriculum.current.name)
            self._checked_stage = curriculum.index
        if step.should_log:
            trainer.telemetry.add(gradient_norms(stages.groups))
            for group in trainer.optimizer.param_groups:
                trainer.telemetry.set(f"learning_rate/{group['name']}", float(group["lr"]))

    def _join_ranks(self, window: Window) -> None:
        """One message at each optimizer step: who was told to stop, what was accepted, which tensors have gradients."""
        trainer = self._trainer
        parameters = list(trainer.stages.named_trainable.values())
        present = [float(p.grad is not None) for p in parameters]
        mine = [
            float(trainer.signals.pending), float(window.tokens), float(window.accepted_tokens), *present,
        ]  # fmt: skip
        stop, window.tokens, window.accepted_tokens, *present = processes.exchange(mine)
        trainer.signals.agreed |= stop > 0
        replicas.average_gradients([p for p, there in zip(parameters, present, strict=True) if there])
