"""A frozen base spread over ranks: each holds its share of every weight, and has one block whole while that block runs.

torch's FSDP2 does it, and transformers has every rank read only its share. What is trained (adapters, experts, routers)
is made afterwards and stays whole on every rank: nothing here reduces a gradient.

FSDP2 gathers a block's weights before its forward and once more when a gradient reaches its output. Ranks that
disagree about a block would therefore gather different ones, and read each other's weights without an error. Two
rules keep them in step, whatever a method decides:

    1. a block that does not run is called all the same: only its inside is replaced, and the gathering is outside
    2. the embeddings ask for a gradient, so that it reaches every block on every rank, trained or not

(That a block returns its very input does no harm: FSDP2 wraps every input that has a gradient, so no two blocks share one.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from headgate.errors import ModelError
from headgate.models import private
from headgate.models.anatomy import Anatomy, describe
from headgate.models.config import ModelConfig, ParallelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FREE, KEEP = "free_full_weight", "keep_full_weight"


def sharding_of(config: ModelConfig, device: torch.device) -> ParallelConfig | None:
    """How the ranks that have met share the base; None where this process is alone and holds it whole.

    Raises ModelError where they are not as many as the shares, or meet on another device than they compute on.
    """
    parallel = config.parallel
    if parallel is None or parallel.ranks == 1 or not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size() != parallel.ranks:
        raise ModelError(
            f"model.parallel={parallel.told} is for {parallel.ranks} ranks, and {dist.get_world_size()} run: start "
            f"{parallel.ranks}, or change model.parallel"
        )
    meets = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if (meets.type if meets is not None else "cpu") != device.type:
        raise ModelError(
            f"model.parallel shards on this machine's {meets}, model.device is {device.type}: leave device out, or hide "
            "the accelerator (CUDA_VISIBLE_DEVICES=)"
        )
    return parallel


def distributed(parallel: ParallelConfig, config: object) -> DistributedConfig:
    """What transformers is told, for a model of this ``config``."""
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    return DistributedConfig(
        fsdp_size=parallel.fsdp, dp_replicate_size=parallel.replicate, fsdp_plan=plan_of(describe(shape))
    )


def plan_of(anatomy: Anatomy) -> dict[str, str]:
    """Which modules are gathered by themselves: each block, the embeddings, the last norm, the head.

    A head tied to the embeddings is one weight with them, so it stays whole from the first forward on.
    """
    names = {module: name for name, module in anatomy.model.named_modules()}
    blocks = names[anatomy.blocks[0]].removesuffix(".0") + ".*"
    style = KEEP if is_tied(anatomy) else FREE
    ends = {names[anatomy.embedding]: style, names[anatomy.head]: style}
    return {**ends, blocks: FREE, names[anatomy.final_norm]: FREE}


def is_tied(anatomy: Anatomy) -> bool:
    """Whether the head's weight is the embeddings'."""
    return anatomy.head.weight is anatomy.embedding.weight


def shard(model: PreTrainedModel, parallel: ParallelConfig) -> None:
    """Spread a model that every rank holds whole, with the same weights; each keeps its share."""
    anatomy = describe(model)
    tied = is_tied(anatomy)
    if tied:  # FSDP2 takes one weight of two modules for two weights: apart while it looks, as in transformers' loading
        weight = anatomy.embedding.get_parameter("weight")
        anatomy.head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    private.distribute(model, distributed(parallel, model.config))
    if tied:
        anatomy.head.weight = anatomy.embedding.weight


def keep_in_step(model: nn.Module) -> None:
    """Install the second rule on a model that was loaded or spread over ranks, once, and see that nothing sharded trains.

    Raises ModelError where one of its own weights, a sharded one, is to be trained.
    """
    base = private.own_sharded(model)
    trained = [name for name, p in base.named_parameters() if p.requires_grad and isinstance(p, DTensor)]
    if trained:
        raise ModelError(
            f"{trained[0]} is sharded over ranks and would be trained: Headgate shards frozen bases only. Train an adapter "
            "(lora), or full weights whole on every rank (without model.parallel)"
        )
    anatomy = describe(model)
    if getattr(base, "headgate_in_step", False):
        return
    object.__setattr__(base, "headgate_in_step", True)
    anatomy.embedding.register_forward_hook(_asking_for_a_gradient)


def _asking_for_a_gradient(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        return output.detach().requires_grad_()
    return output


def is_sharded(model: nn.Module) -> bool:
    """Whether any of its parameters lies on several ranks: all of them must then run every forward together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(weight: Tensor) -> Tensor:
    """A weight that is read outside of its module's forward, gathered where it is sharded. All ranks must ask."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def head_tensors(anatomy: Anatomy) -> tuple[Tensor, Tensor | None]:
    """Weight ``[V, H]`` and bias of the language-model head, to be read outside of its forward as ``whole`` reads them."""
    weight, bias = anatomy.head.weight, getattr(anatomy.head, "bias", None)
    assert isinstance(weight, Tensor)
    return whole(weight), bias


def forward_was_stopped(model: nn.Module) -> None:
    """After an exception took every rank out of the same forward: what it had gathered is let go."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def at_rest(model: nn.Module) -> None:
    """Every weight in shares again. On all ranks, before one of them asks for a state dict, which puts its own to rest:
    who still held the embeddings whole would not gather them with the others the next time."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def resident(model: nn.Module) -> tuple[int, int]:
    """(elements of the parameters held by this rank, of the whole model)."""
    parameters = list(model.parameters())
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return here, sum(p.numel() for p in parameters)
