"""Data-parallel replicas that stay bitwise equal, whatever was skipped.

Adapters are small, so gradients are averaged in one flat all-reduce at the end of each accumulation window
instead of in DistributedDataParallel's backward hooks. A rejected last micro-batch, a stage that freezes
groups and an expert added in mid-run then need no special case: what has a gradient on any rank is averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headgate.errors import ConfigError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def take_over_reduction(accelerator: Any) -> None:
    """Keep accelerate from wrapping the model in DistributedDataParallel; refuse engines that step by themselves."""
    kind = str(accelerator.distributed_type)
    if kind.endswith("DEEPSPEED"):
        raise ConfigError(
            "DeepSpeed steps its optimizer inside backward, so micro-batches cannot be gated: "
            "launch with DDP (accelerate launch --multi_gpu)"
        )
    if kind.endswith(("MULTI_GPU", "MULTI_CPU")):
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)


def broadcast(parameters: Sequence[nn.Parameter]) -> None:
    """Rank 0's values on every rank."""
    if world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean over ranks of every gradient, in one collective. A gradient missing on a rank counts as zero there."""
    if world_size() == 1:
        return
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], device=device, dtype=torch.float32)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    learning = [p for p, there in zip(parameters, present.tolist(), strict=True) if there]
    if not learning:
        return
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in learning]
    )
    dist.all_reduce(flat)
    flat /= world_size()
    offset = 0
    for p in learning:
        p.grad = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
        offset += p.numel()


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place on one rank or many."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_agree(decision: Tensor) -> bool:
    """Logical AND over ranks: every rank takes the same decision."""
    if world_size() > 1:
        flag = decision.to(torch.int32).reshape(1)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())
    return bool(decision)
