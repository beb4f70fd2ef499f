"""Data-parallel replicas that stay bitwise equal, whatever was skipped.

Adapters are small, so gradients are averaged in one flat all-reduce at the end of each accumulation window
instead of in DistributedDataParallel's backward hooks. A rejected last micro-batch, a stage that freezes
groups and an expert added in mid-run then need no special case: what has a gradient on any rank is averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from headgate.errors import ConfigError, TrainingError
from headgate.training.processes import ENGINES, PLAIN, control_group, exchange, gather, world_size

if TYPE_CHECKING:
    from accelerate import Accelerator


def take_over_reduction(accelerator: Accelerator) -> None:
    """Keep accelerate from wrapping the model in DistributedDataParallel; refuse engines that step by themselves."""
    kind = str(accelerator.distributed_type)
    if kind.endswith("DEEPSPEED"):
        raise ConfigError(f"{ENGINES['ACCELERATE_USE_DEEPSPEED']}: {PLAIN}")
    if kind.endswith("FSDP"):
        raise ConfigError(f"{ENGINES['ACCELERATE_USE_FSDP']}: {PLAIN}")
    if kind.endswith("MEGATRON_LM"):
        raise ConfigError(f"{ENGINES['ACCELERATE_USE_MEGATRON_LM']}: {PLAIN}")
    if kind.endswith(("MULTI_GPU", "MULTI_CPU")):
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)


def _group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The group that moves this tensor: counters and votes stay on the CPU, which NCCL does not serve."""
    return control_group() if tensor.device.type == "cpu" else None


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Rank 0's values on every rank."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0, group=_group(tensor))


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Mean over ranks of every gradient, in one collective. A gradient missing on a rank counts as zero there."""
    if world_size() == 1 or not parameters:
        return
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in parameters]
    )
    dist.all_reduce(flat)
    flat /= world_size()
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
        offset += p.numel()


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place on one rank or many."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=_group(tensor))
    return tensor


def all_agree(decision: Tensor) -> bool:
    """Logical AND over ranks: every rank takes the same decision."""
    if world_size() > 1:
        return exchange([float(bool(decision))])[0] == world_size()
    return bool(decision)


def require_equal(named: Mapping[str, Tensor], step: int) -> None:
    """Before a checkpoint is written: the ranks hold the same weights. Raises TrainingError naming a tensor that differs."""
    if world_size() == 1 or not named:
        return
    sums = torch.stack([_checksum(tensor) for tensor in named.values()]).cpu()
    ranks = gather(sums)
    for place, name in enumerate(named):
        if any(int(other[place]) != int(ranks[0][place]) for other in ranks):
            raise TrainingError(
                f"the ranks hold different values of {name} at step {step}, so the run means nothing from there on: go on "
                "from the checkpoint before it in one process, and report this"
            )


def _checksum(tensor: Tensor) -> Tensor:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(kind).sum(dtype=torch.int64)
