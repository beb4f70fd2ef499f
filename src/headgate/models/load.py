"""Load a base model and its tokenizer, and put an adapter on it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from headgate.config import StrictConfig, complaints
from headgate.errors import ConfigError, ModelError
from headgate.models.adapters import add_adapter, load_adapter
from headgate.models.alignment import align
from headgate.models.anatomy import describe
from headgate.models.compiled import compile_parts
from headgate.models.config import LoraConfig, ModelConfig
from headgate.models.devices import choose_device, choose_dtype
from headgate.models.places import EMBEDDED, check_place
from headgate.models.shapes import SHAPES
from headgate.models.sharding import distributed, keep_in_step, shard, sharding_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Config = TypeVar("Config", bound=StrictConfig)


def load_base(config: ModelConfig, *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen-or-not base model on its device, in its dtype, and its tokenizer.

    With ``parallel`` and as many ranks as it names, every rank holds (and of a saved model reads) its share; a process
    alone holds all of it. Raises ModelError for an unknown name, a folder without weights, an architecture without a
    description, 4/8-bit loading where it cannot work, or another number of ranks.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    extra: dict[str, object] = {}
    if config.attn_implementation != "auto":
        extra["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit or config.load_in_8bit:
        extra["quantization_config"] = _quantization(config, device, dtype)
    name = config.name_or_path
    parallel = sharding_of(config, device)
    if name.startswith("random:"):
        if config.load_in_4bit or config.load_in_8bit:
            raise ModelError("a random: model cannot be loaded in 4 or 8 bits: load real weights")
        model = _random_model(name.removeprefix("random:"), dtype, seed, extra)
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            raise ModelError(
                f"{name} has a smaller vocabulary than the embedded tokenizer ({len(tokenizer)})"
            )
    else:
        path = str(EMBEDDED) if name == "embedded" else name
        check_place(name)
        try:
            if parallel is not None:
                shape = AutoConfig.from_pretrained(path, revision=config.revision)
                extra["distributed_config"] = distributed(parallel, shape)
            model = AutoModelForCausalLM.from_pretrained(path, revision=config.revision, dtype=dtype, **extra)
            tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.name_or_path={name!r} cannot be loaded: {str(error).splitlines()[0]} "
                "(give a hub id that this machine can reach, a local folder, or 'embedded')"
            ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no end-of-sequence token: set one and save it")
    describe(model)
    model.config.use_cache = True
    if "quantization_config" not in extra:
        model.to(device)
    if parallel is not None:
        model.requires_grad_(False)
        if name.startswith("random:"):
            shard(model, parallel)
        keep_in_step(model)
    align(model)
    model.eval()
    return model, tokenizer


def _quantization(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> transformers.BitsAndBytesConfig:
    if device.type != "cuda":
        raise ModelError(
            f"model.load_in_{'4' if config.load_in_4bit else '8'}bit needs CUDA and bitsandbytes; this device is {device.type}: "
            "remove the key or run on a GPU"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError("4/8-bit loading needs bitsandbytes: pip install 'headgate[cuda]'") from None
    if config.load_in_4bit:
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def _random_model(shape: str, dtype: torch.dtype, seed: int, extra: dict[str, object]) -> Any:
    """A randomly initialised model of a known shape or of a config.json; same weights for the same seed."""
    if shape.endswith(".json"):
        if not Path(shape).exists():
            raise ModelError(f"random:{shape}: the file does not exist")
        options = json.loads(Path(shape).read_text())
    elif shape in SHAPES:
        options = dict(SHAPES[shape])
    else:
        close = difflib.get_close_matches(shape, SHAPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(SHAPES)}, or a config.json"
        raise ModelError(f"random:{shape} is no known shape: {hint}")
    config = AutoConfig.for_model(**{**options, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **extra)
    return model


def load_model(
    name_or_path: str = "embedded",
    *,
    lora: dict[str, object] | LoraConfig | None = None,
    seed: int = 42,
    **options: object,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal LM, ready to train, and its tokenizer.

    Args:
        name_or_path: hub id, folder, ``embedded`` or ``random:<shape>``.
        lora: the ``lora`` block of a recipe; None leaves the model plain and fully trainable.
        seed: of the adapter's initialisation, and of a ``random:`` model's.
        options: the other keys of the ``model`` block (revision, adapter, dtype, device, ...).

    Raises ConfigError for an unknown option or value, ModelError for a model or adapter that cannot be loaded.
    """
    unknown = [name for name in options if name not in ModelConfig.model_fields]
    if unknown:
        known = ["lora", "seed", *ModelConfig.model_fields]
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
        raise ConfigError(f"load_model({unknown[0]}=...): unknown option: {hint}")
    config = made_of(ModelConfig, {"name_or_path": name_or_path, **options}, "model")
    adapter = made_of(LoraConfig, lora, "lora") if isinstance(lora, dict) else lora
    model, tokenizer = load_base(config, seed=seed)
    return prepare_model(model, config, adapter, seed=seed), tokenizer


def made_of(kind: type[Config], options: Mapping[str, object], where: str) -> Config:
    """A configuration of a recipe's block ``where``. Raises ConfigError with the dotted place and the value."""
    try:
        return kind(**options)
    except ValidationError as error:
        raise ConfigError("; ".join(complaints(error, kind, where))) from None


def prepare_model(model: PreTrainedModel, config: ModelConfig, lora: LoraConfig | None, *, seed: int) -> Any:
    """Adapter, activation checkpointing and compiled parts on a loaded base."""
    prepared: PreTrainedModel | PeftModel = model
    if config.adapter is not None:
        prepared = load_adapter(model, config.adapter, trainable=True)
    elif lora is not None:
        prepared = add_adapter(model, lora, seed=seed)
    if config.activation_checkpointing:
        # Reentrant checkpointing would give LoRA no gradients at all under a frozen embedding.
        prepared.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile is not None:
        compile_parts(prepared, config.compile)
    return prepared
