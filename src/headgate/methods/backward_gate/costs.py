"""Forwards and head passes of a gate beyond a batch's own, for the FLOP account."""

from __future__ import annotations

from headgate.methods.backward_gate.config import BackwardGateConfig
from headgate.methods.backward_gate.views import SELECTED
from headgate.methods.step import Step


def extra_forwards(config: BackwardGateConfig, step: Step, scored: bool, depth: float) -> float:
    """The pool's scoring, charged to the batches that it filled; the original's second forward.

    ``scored``: whether this micro-batch was scored; ``depth``: share of the blocks that a score takes.
    """
    if SELECTED in step.batch:
        return _scored_per_token(step) * depth
    return float(config.forward == "double" and scored)


def extra_heads(config: BackwardGateConfig, step: Step, scored: bool, depth: float) -> float:
    """A score from a block's output goes through the head as if no block followed."""
    if SELECTED in step.batch:
        return _scored_per_token(step) * (1 - depth)  # the forwards above hold the other share of a head
    return float(config.score_layer is not None and scored)


def _scored_per_token(step: Step) -> float:
    """Tokens that the pool scored to fill this batch, for each of its own."""
    return float(step.batch[SELECTED].sum()) / max(1, int(step.valid.sum()))
