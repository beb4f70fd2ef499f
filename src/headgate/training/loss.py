"""The task loss: next-token cross-entropy, through the model's own head or chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import Anatomy, Columns
from headgate.models.sharding import head_tensors
from headgate.models.surgery import head_bypassed, head_input_captured
from headgate.modules.fused_head import HeadObserver, chunked_head_loss

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

CHUNKED_FROM_VOCABULARY = 32_768
"""From this vocabulary on, ``loss: auto`` never materialises [B, T, V] logits."""


@dataclass
class TaskLoss:
    """Loss of one micro-batch as it enters the backward, and what the forward showed.

    ``recomputes``: the backward makes the head's logits again (so that a rejected batch never pays for its gradient).
    """

    loss: Tensor
    hidden: Tensor | None
    logits: Tensor | None
    outputs: ModelOutput | None
    recomputes: bool = False


def choose_loss(choice: str, anatomy: Anatomy, label_smoothing: float, observed: bool = False) -> str:
    """``auto`` -> ``plain`` or ``chunked``. Raises ConfigError where chunked cannot work.

    ``observed``: a method reads the head's errors, which the chunked loss has at hand and plain computes twice.
    """
    chosen = choice
    if choice == "auto":
        wanted = observed or anatomy.vocab_size >= CHUNKED_FROM_VOCABULARY
        chosen = "chunked" if (wanted and _plain_head(anatomy)) or label_smoothing > 0 else "plain"
    if chosen == "chunked" and not _plain_head(anatomy):
        raise ConfigError(
            f"loss: chunked needs a plain linear head, this model's is {type(anatomy.head).__name__}: set loss: plain"
        )
    if chosen == "plain" and label_smoothing > 0:
        raise ConfigError("label_smoothing works with loss: chunked: set training.loss to chunked or auto")
    return chosen


def _plain_head(anatomy: Anatomy) -> bool:
    return isinstance(anatomy.head, nn.Linear)


def trained_tokens(labels: Tensor) -> Tensor:
    """Labelled positions after the causal shift."""
    return labels[..., 1:].ne(IGNORE_INDEX).sum()


def plain_loss(model: nn.Module, anatomy: Anatomy, inputs: dict[str, object]) -> TaskLoss:
    """The model's own loss; the head's input is captured on the way."""
    with head_input_captured(anatomy.head) as captured:
        outputs = model(**inputs)
    return TaskLoss(outputs.loss, captured[-1], outputs.logits, outputs)


def chunked_loss(
    model: nn.Module,
    anatomy: Anatomy,
    inputs: Columns,
    *,
    num_items: Tensor | int | None,
    label_smoothing: float = 0.0,
    observers: tuple[HeadObserver, ...] = (),
    gated: bool = False,
) -> TaskLoss:
    """Cross-entropy from the head's input, chunk by chunk; ``[B, T, V]`` is never materialised."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    inputs.pop("num_items_in_batch", None)
    with head_bypassed(anatomy.head) as captured:
        outputs = model(**inputs)
    weight_VH, bias_V = head_tensors(anatomy)
    loss = chunked_head_loss(
        captured[-1],
        weight_VH,
        labels,
        bias=bias_V,
        softcap=anatomy.softcap,
        label_smoothing=label_smoothing,
        num_items=num_items,
        observers=observers,
        gradients="recompute" if gated else "forward",
    )
    return TaskLoss(loss, captured[-1], None, outputs, recomputes=gated)
