"""What training did, counted: micro-batches, tokens and executed FLOPs, of a window, a rank and the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headgate.methods.step import Step
from headgate.training import processes
from headgate.training.accounting import backward_flops, forward_flops


@dataclass
class Window:
    """Counts of one gradient accumulation window: micro-batches and trained tokens, offered and accepted."""

    step: int = -1
    index: int = 0
    offered: int = 0
    accepted: int = 0
    tokens: Tensor | float = 0
    accepted_tokens: Tensor | float = 0
    loss: Tensor | float = 0.0
    last: Step | None = None

    def share_correction(self) -> Tensor | float:
        """What a gradient divided by all offered tokens must be multiplied by."""
        if self.accepted == self.offered:
            return 1.0
        counts = torch.stack([torch.as_tensor(self.tokens), torch.as_tensor(self.accepted_tokens)]).float()
        return counts[0] / counts[1].clamp(min=1)


@dataclass
class Totals:
    """Of the run so far. ``summed_loss``: over optimizer steps, the mean loss of each."""

    trained_tokens: float
    flops: float
    summed_loss: float


class CountedTraining:
    """The accounts. Every rank counts what it did itself; what is read is the sum over ranks."""

    methods: Any
    anatomy: Any
    telemetry: Any
    signals: Any
    window: Window
    sizes: tuple[int, bool]
    backward_share: float
    _measure_backward: Any
    trained_tokens: Any
    flops: Any
    summed_loss: Any
    _flops_reported: float = 0.0

    def totals(self) -> Totals:
        """What all ranks did together. Collective."""
        tokens, flops, loss = processes.exchange(
            [float(self.trained_tokens), float(self.flops), float(self.summed_loss)]
        )
        return Totals(tokens, flops, loss / processes.world_size())

    def _reached(self, step: Step) -> float:
        """Share of the blocks that ran before a method stopped the forward, or before it began."""
        if step.phase != "partial":
            return 0.0
        asked: int = min(self.methods.partial_blocks())  # once, at the first
        blocks: int = self.anatomy.num_blocks
        return (asked + 1) / blocks

    def _count(self, step: Step, reached: float, heads: int) -> None:
        window = self.window
        tokens = step.num_tokens
        window.offered += 1
        window.tokens = window.tokens + tokens
        if step.accepted:
            assert step.raw_loss is not None
            window.accepted += 1
            window.accepted_tokens = window.accepted_tokens + tokens
            self.trained_tokens = self.trained_tokens + tokens
            window.loss = window.loss + step.raw_loss
        if step.task_loss is not None:
            self.telemetry.add({"loss_all": step.task_loss})
        self.flops = self.flops + self._flops(step, reached, heads)
        valid = step.valid
        self.telemetry.add({"padding_fraction": 1 - valid.float().mean()})

    def _flops(self, step: Step, reached: float, heads: int) -> Any:
        """Executed FLOPs on real tokens; ``reached``: share of the blocks that ran at all; ``heads``: the head's passes."""
        if not reached:
            return 0.0
        lengths = step.valid.sum(-1).float()
        if step.segment_ids is not None:
            rows = torch.arange(len(step.segment_ids), device=lengths.device).unsqueeze(-1)
            apart = step.segment_ids + rows * step.segment_ids.shape[1]  # numbers restart in every row
            lengths = torch.bincount(apart[step.segment_ids >= 0]).float()
        tokens: Any = lengths.sum()
        pairs: Any = (lengths * (lengths + 1) / 2).sum()
        cost = self.methods.cost(step)
        share: Any = reached * cost.share
        run: Any = forward_flops(self.anatomy, tokens, pairs, share, heads=heads + cost.heads)
        run = run + cost.forwards * forward_flops(self.anatomy, tokens, pairs)
        if not step.accepted:
            return run
        if self.methods.skips_blocks:
            self._measure_backward()  # what trains may change from window to window
        trainable, frozen_base = self.sizes
        forward = forward_flops(self.anatomy, tokens, pairs, share * self.backward_share)
        return run + backward_flops(forward, tokens, trainable, frozen_base)

    def floating_point_ops(self, inputs: Any) -> float:
        """FLOPs executed since the last call: skipped forwards, backwards and blocks are not counted."""
        total = float(self.flops)
        done, self._flops_reported = total - self._flops_reported, total
        return done
