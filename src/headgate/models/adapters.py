"""The adapter on a base model: PEFT's own made, or somebody's saved one, each checked before tensors are."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from headgate.errors import ConfigError, ModelError
from headgate.models.anatomy import describe, is_linear, linear_size
from headgate.models.config import LoraConfig
from headgate.models.places import is_local
from headgate.models.private import whole_sizes
from headgate.models.targets import blocks_of, check_rank, target_modules

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, config: LoraConfig, *, seed: int = 0) -> PeftModel:
    """A PEFT model over ``model``; the same seed gives the same initialisation in every arm of a comparison.

    Raises ModelError when a target module matches nothing.
    """
    import peft

    peft_config: PeftConfig
    anatomy = describe(model)
    if config.peft_type.lower() != "lora":
        peft_config = other_config(config)
    else:
        linears = {name: module for name, module in anatomy.model.named_modules() if is_linear(module)}
        targets = target_modules(linears, anatomy.family.linears, config.target_modules)
        sizes = {n: linear_size(m) for n, m in linears.items() if hasattr(m, "in_features")}
        check_rank(sizes, targets, config.r)
        peft_config = peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # a scale: PEFT divides it by r
            lora_dropout=config.dropout,
            target_modules=targets,
            layers_to_transform=blocks_of(config.layers, anatomy.num_blocks),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with whole_sizes():
                return peft.get_peft_model(model, peft_config)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"lora (peft_type={config.peft_type}): {str(error).splitlines()[0]}") from error


def other_config(config: LoraConfig) -> PeftConfig:
    """The configuration of another PEFT method, its keys as they were given. Raises ConfigError naming what is wrong."""
    import peft

    wanted = config.peft_type.lower()
    kinds = {kind.value.lower(): kind for kind in peft.PeftType}
    if wanted not in kinds:
        close = difflib.get_close_matches(wanted, [*kinds, "lora"], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"lora.peft_type={config.peft_type!r} is no PEFT method: {hint}there are {', '.join(sorted(kinds))}"
        )
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kinds[wanted]]
    known = [field.name for field in fields(kind)]
    for key in config.options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}"
            raise ConfigError(f"lora.{key}: {wanted} has no such key: {hint}")
    try:
        made: Callable[..., PeftConfig] = kind
        return made(task_type="CAUSAL_LM", **config.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora (peft_type={wanted}): {str(error).splitlines()[0]}") from None


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> Any:
    """Somebody's saved PEFT adapter on ``model``. Raises ModelError if it was made for another base's shapes."""
    import peft

    check_adapter(folder)
    check_recorded_base(model, Path(folder))
    try:
        with whole_sizes():
            return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(
            f"adapter {folder!r} does not fit this base model: {str(error).splitlines()[0]}"
        ) from error


def check_adapter(folder: str) -> None:
    """A saved PEFT adapter, looked at without its base. Raises ModelError for files that are absent, cut or no adapter's.

    A name that is no folder here may be a repository of the hub, and is left to PEFT.
    """
    place = Path(folder)
    if not place.is_dir():
        if is_local(folder):
            raise ModelError(f"model.adapter={folder!r}: the folder does not exist")
        return
    config = place / "adapter_config.json"
    if not config.exists():
        raise ModelError(f"model.adapter={folder!r} has no adapter_config.json: it is not a PEFT adapter")
    try:
        recorded = json.loads(config.read_text(encoding="utf-8"))
        str(recorded["peft_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config} is damaged ({error}): copy the adapter again") from None
    weights = place / "adapter_model.safetensors"
    if not weights.exists():
        if not (place / "adapter_model.bin").exists():
            raise ModelError(
                f"model.adapter={folder!r} has no adapter_model.safetensors: copy the adapter again"
            )
        return
    try:
        with safe_open(weights, "pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{weights} is damaged ({error}): copy the adapter again") from None


def check_recorded_base(model: nn.Module, folder: Path) -> None:
    """ModelError if the adapter names another base; where a copy lies does not matter, its name does."""
    config = folder / "adapter_config.json"
    recorded = json.loads(config.read_text()).get("base_model_name_or_path") if config.exists() else None
    name = getattr(model.config, "_name_or_path", None)
    if recorded and name and Path(recorded).name != Path(name).name:
        raise ModelError(
            f"adapter '{folder}' was made for base model {recorded!r}, this is {name!r}: load it on its own base (or "
            "correct base_model_name_or_path in its adapter_config.json, if this is the same model under another name)"
        )
