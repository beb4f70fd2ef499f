"""FLOPs that one micro-batch really executed, on real tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.methods.compose import MethodStack
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.training.accounting import backward_flops, forward_flops
from headgate.training.stages import Stages

if TYPE_CHECKING:
    from headgate.training.mixin import MethodsMixin


def reached_share(step: Step, methods: MethodStack, anatomy: Anatomy) -> float:
    """Share of the blocks that ran before a method stopped the forward, or before it began."""
    if step.phase != "partial":
        return 0.0
    asked = min(methods.partial_blocks())  # once, at the first
    return (asked + 1) / anatomy.num_blocks


def count_readings(trainer: MethodsMixin) -> None:
    """What methods read besides the steps' own batches enters the account."""
    stages = trainer.stages
    for read in trainer.methods.take_readings():
        flops = forward_flops(trainer.anatomy, read.tokens, read.pairs, read.share, heads=read.heads)
        if read.trained:
            share = read.share * stages.backward_share
            forward = forward_flops(trainer.anatomy, read.tokens, read.pairs, share, heads=read.heads)
            flops += backward_flops(forward, read.tokens, stages.trainable, stages.base_is_mostly_frozen)
        trainer.run_state.flops = trainer.run_state.flops + flops


def executed_flops(
    step: Step, methods: MethodStack, anatomy: Anatomy, stages: Stages, reached: float, heads: int
) -> Tensor | float:
    """Forward, what methods ran besides, and the backward of an accepted batch.

    ``reached``: share of the blocks that ran at all; ``heads``: passes through the head.
    """
    if not reached:
        return 0.0
    lengths = step.valid.sum(-1).float()
    if step.segment_ids is not None:
        rows = torch.arange(len(step.segment_ids), device=lengths.device).unsqueeze(-1)
        apart = step.segment_ids + rows * step.segment_ids.shape[1]  # numbers restart in every row
        lengths = torch.bincount(apart[step.segment_ids >= 0]).float()
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) / 2).sum()
    cost = methods.cost(step)
    share = reached * cost.share
    run = forward_flops(anatomy, tokens, pairs, share, heads=heads + cost.heads)
    run = run + cost.forwards * forward_flops(anatomy, tokens, pairs)
    if not step.accepted:
        return run
    if methods.skips_blocks:
        stages.measure_backward()  # what trains may change from window to window
    forward = forward_flops(anatomy, tokens, pairs, share * stages.backward_share)
    return run + backward_flops(forward, tokens, stages.trainable, stages.base_is_mostly_frozen)
