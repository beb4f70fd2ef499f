"""Every private member of transformers, PEFT and accelerate that Headgate reads or overrides, in one place.

No release promises them. ``tests/models/test_private.py`` finds each in the installed versions, and finds none elsewhere in
the package: an upgrade that moves one fails there, by name, and is mended here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer
    from transformers.distributed.configuration_utils import DistributedConfig

    from headgate.models.anatomy import Columns

T = TypeVar("T")
OVERRIDDEN = (
    "_clip_grad_norm",
    "_get_eval_sampler",
    "_get_grad_norm",
    "_get_train_sampler",
    "_init_training_state",
    "_load_best_model",
    "_load_from_checkpoint",
    "_maybe_log_save_evaluate",
    "_prepare_for_training",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
)
"""Methods of ``transformers.Trainer`` that MethodsMixin and HeadgateTrainer override, calling what they replace."""
READ = {
    "Trainer": ("_prepare_inputs", "_wrap_model", "_get_output_dir", "_signature_columns", "_created_lr_scheduler"),
    "Accelerator": ("_optimizers",),
    "PretrainedConfig": ("_attn_implementation", "_name_or_path"),
    "GradientCheckpointingLayer": ("_gradient_checkpointing_func",),
    "BaseTunerLayer": ("_disable_adapters",),
    "LoraLayer": ("_get_in_out_features",),
    "PreTrainedModel": ("_is_distributed_loading_by_transformers", "_tp_size", "_device_mesh"),
}  # fmt: skip
"""What the functions below read or write, by the class that has it."""


# -- transformers.Trainer ---------------------------------------------------------------------------------
def inputs_on_device(trainer: Trainer, inputs: Columns) -> Columns:
    """A batch as the trainer hands it to the model."""
    return trainer._prepare_inputs(inputs)


def wrapped_for_evaluation(trainer: Trainer, loader: DataLoader[Columns]) -> nn.Module:
    """The trainer's model in the precision and wrapper in which it is evaluated."""
    assert isinstance(trainer.model, nn.Module)
    return trainer._wrap_model(trainer.model, training=False, dataloader=loader)


def run_folder(trainer: Trainer, trial: object) -> Path:
    """Where the trainer's checkpoints lie."""
    return Path(trainer._get_output_dir(trial=trial))


def keep_columns(trainer: Any, names: Iterable[str]) -> None:
    """Columns of the data set that reach the collator besides the arguments of the model's forward."""
    trainer._signature_columns = list(dict.fromkeys([*trainer._signature_columns, *names]))


def own_scheduler(trainer: Trainer) -> None:
    """The schedule was made here: the trainer must save and step it as one of its own."""
    trainer._created_lr_scheduler = True


# -- accelerate -------------------------------------------------------------------------------------------
def forget_optimizers(accelerator: Accelerator) -> None:
    """Before another optimizer is prepared: the old one would be stepped, scaled and saved as well."""
    accelerator._optimizers.clear()


# -- a base spread over ranks (transformers.distributed, torch's FSDP2) ------------------------------------------
def distribute(model: PreTrainedModel, config: DistributedConfig) -> None:
    """Spread a model in memory as ``from_pretrained(distributed_config=config)`` spreads one that it loads."""
    prepared, _, mesh = type(model).prepare_distribute_model(config)
    type(model).maybe_distribute_model(model, prepared, mesh)


def own_sharded(model: Any) -> Any:
    """The transformers model, no longer marked as spread by transformers.

    With the mark its Trainer refuses checkpoints and hooks an all-reduce to every trained parameter, which deadlocks
    where ranks use different ones; with a tensor-parallel size (even 1) PEFT gathers the base to save an adapter,
    and with a mesh it may spread the adapter. What is trained here is whole on every rank, reduced once a window and saved by one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base._is_distributed_loading_by_transformers, base._tp_size, base._device_mesh = False, None, None
    return base


@contextmanager
def whole_sizes() -> Iterator[None]:
    """Inside, PEFT makes adapters of a spread linear's full size. It takes a mesh with copies for tensor parallelism, and
    would make them of a share's."""
    from peft.tuners.lora import layer

    lora_layer: Any = layer
    original = lora_layer._get_in_out_features

    def sizes(module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        return (
            (module.in_features, module.out_features) if isinstance(module, nn.Linear) else original(module)
        )

    lora_layer._get_in_out_features = sizes
    try:
        yield
    finally:
        lora_layer._get_in_out_features = original


# -- models, configurations and PEFT layers -----------------------------------------------------------------------
class Tuner(Protocol):
    """A layer with a switch, as PEFT has them: around its base layer."""

    _disable_adapters: bool
    base_layer: nn.Module


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """``eager``, ``sdpa``, ..., or None where the configuration does not say."""
    implementation: str | None = config._attn_implementation
    return implementation


def choose_attention(config: PreTrainedConfig, implementation: str | None) -> None:
    """Have a model that is built from ``config`` attend so."""
    config._attn_implementation = implementation


def checkpointed(block: nn.Module, run: Callable[..., T], *inputs: object) -> T:
    """``run(*inputs)``, recomputed in the backward as the block's own forward would be."""
    again: Callable[..., T] = vars(block)["_gradient_checkpointing_func"]
    return again(run, *inputs)


def name_or_path(model: Any) -> str:
    """Where a model was loaded from."""
    return str(model.config._name_or_path)


def can_disable_adapters(module: nn.Module) -> bool:
    """Whether a module is a PEFT layer with a switch."""
    return hasattr(type(module), "_disable_adapters")


def adapters_disabled(layer: Tuner) -> bool:
    """Whether a PEFT layer is its base layer at present."""
    return bool(layer._disable_adapters)


def disable_adapters(layer: Tuner, disabled: bool) -> None:
    """Without PEFT's ``enable_adapters``, which also changes what requires a gradient."""
    layer._disable_adapters = disabled
