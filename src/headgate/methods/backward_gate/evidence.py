"""Where evidence comes from: ready-made logits, a block's output, or a forward of the pool."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headgate.errors import ConfigError, ModelError
from headgate.methods.backward_gate.gate import Gate
from headgate.methods.step import ForwardStopped, Step
from headgate.models.anatomy import Anatomy, Batch, model_inputs
from headgate.models.aside import look_aside
from headgate.models.sharding import forward_was_stopped, whole
from headgate.models.surgery import head_bypassed, on_block_output
from headgate.modules.fused_head import chunked_head_loss
from headgate.modules.head_sketch import Evidence


def head_weight(anatomy: Anatomy) -> Tensor:
    """``[V, H]``. Raises ModelError where the head has no such weight."""
    weight = getattr(anatomy.head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(
            f"backward_gate reads the head's weight [V, H], which {type(anatomy.head).__name__} does not have"
        )
    return whole(weight.detach())


def of_step(gate: Gate, anatomy: Anatomy, step: Step, *, thins_tokens: bool) -> Evidence:
    """Of this micro-batch, summed over ranks, from wherever its head was computed.

    Raises ConfigError where tokens are to be drawn (``thins_tokens``) and ready-made logits leave no place for it.
    """
    assert step.hidden is not None
    if step.phase == "partial":
        seen = at_block(gate, anatomy, step.hidden, step.labels)
    elif step.logits is None:
        seen = gate.sketcher.end()
    elif not thins_tokens:
        seen = from_logits(gate, anatomy, step)
    else:
        raise ConfigError(
            "score: token draws tokens inside the chunked head loss: set training.loss: chunked"
        )
    return Evidence.unpacked(step.sum_across_ranks(seen.packed()))


def from_logits(gate: Gate, anatomy: Anatomy, step: Step) -> Evidence:
    """From the logits of ``loss: plain``."""
    assert step.hidden is not None and step.logits is not None
    weight = head_weight(anatomy)
    return gate.embed(step.hidden, step.logits, step.labels, weight=weight, softcap=anatomy.softcap)


@torch.no_grad()
def at_block(gate: Gate, anatomy: Anatomy, hidden: Tensor, labels: Tensor) -> Evidence:
    """From a block's output, through the final norm and the head as if no block followed."""
    return _through_head(gate, anatomy, anatomy.final_norm(hidden), labels, groups=1)


@torch.no_grad()
def of_sequences(gate: Gate, anatomy: Anatomy, batch: Batch, layer: int | None = None) -> Evidence:
    """Per sequence, by one forward of the batch without a graph, in evaluation mode.

    With ``layer`` the forward stops after that block, whose output goes through the final norm and the head.
    """
    model = anatomy.model
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in model_inputs(batch, labels=False).items()}
    with look_aside(model):
        hidden = _whole(anatomy, inputs) if layer is None else _up_to(anatomy, inputs, layer)
    labels = batch["labels"].to(device)
    return _through_head(gate, anatomy, hidden, labels, groups=len(labels))


def _whole(anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> Tensor:
    with head_bypassed(anatomy.head) as captured:
        anatomy.model(**inputs)
    return captured[-1]


def _up_to(anatomy: Anatomy, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
    reached: list[Tensor] = []

    def stop(hidden: Tensor) -> Tensor:
        reached.append(hidden)
        raise ForwardStopped

    handle = on_block_output(anatomy.blocks[layer], stop)
    try:
        anatomy.model(**inputs)
    except ForwardStopped:
        forward_was_stopped(anatomy.model)
    finally:
        handle.remove()
    return anatomy.final_norm(reached[-1])


def _through_head(gate: Gate, anatomy: Anatomy, hidden: Tensor, labels: Tensor, groups: int) -> Evidence:
    gate.sketcher.begin(groups)
    chunked_head_loss(
        hidden,
        head_weight(anatomy),
        labels,
        bias=getattr(anatomy.head, "bias", None),
        softcap=anatomy.softcap,
        observers=(gate.sketcher.observe,),
    )
    return gate.sketcher.end()


@torch.no_grad()
def forward_again(step: Step) -> None:
    """The second forward of the original, for its cost; its result is not used and no random draw is."""
    devices = [step.labels.device] if step.labels.is_cuda else []
    inputs = model_inputs(step.batch, labels=False)
    with torch.random.fork_rng(devices=devices):
        step.model(**inputs)
