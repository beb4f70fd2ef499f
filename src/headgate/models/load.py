"""Load a base model and its tokenizer, and put an adapter on it."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from headgate.errors import ModelError
from headgate.models.alignment import align
from headgate.models.anatomy import describe, is_linear
from headgate.models.config import LoraConfig, ModelConfig
from headgate.models.devices import choose_device, choose_dtype
from headgate.models.shapes import SHAPES

EMBEDDED = Path(__file__).parent / "embedded"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_base(config: ModelConfig, *, seed: int = 0) -> tuple[Any, Any]:
    """The frozen-or-not base model on its device, in its dtype, and its tokenizer.

    Raises ModelError for an unknown name, a folder without weights, an architecture without a description,
    or 4/8-bit loading where it cannot work.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    extra: dict[str, Any] = {}
    if config.attn_implementation != "auto":
        extra["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit or config.load_in_8bit:
        extra["quantization_config"] = _quantization(config, device, dtype)
    name = config.name_or_path
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
        _check_folder(path)
        try:
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
    align(model)
    model.eval()
    return model, tokenizer


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ModelError(f"model folder {path!r} does not exist: check model.name_or_path")
        return
    if not (folder / "config.json").exists():
        raise ModelError(f"model folder {path!r} has no config.json: it is not a saved transformers model")
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise ModelError(f"model folder {path!r} has no weights (looked for {', '.join(WEIGHT_FILES)})")


def _quantization(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
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


def _random_model(shape: str, dtype: torch.dtype, seed: int, extra: dict[str, Any]) -> Any:
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


def add_adapter(model: Any, config: LoraConfig, *, seed: int = 0) -> Any:
    """A PEFT model over ``model``; the same seed gives the same initialisation in every arm of a comparison.

    Raises ModelError when a target module matches nothing.
    """
    import peft

    anatomy = describe(model)
    if config.peft_type != "lora":
        kinds = {kind.value.lower(): kind for kind in peft.PeftType}
        if config.peft_type.lower() not in kinds:
            raise ModelError(
                f"lora.peft_type={config.peft_type!r} is no PEFT method: {', '.join(sorted(kinds))}"
            )
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kinds[config.peft_type.lower()]]
        try:
            peft_config = kind(task_type="CAUSAL_LM", **config.other_options)
        except TypeError as error:
            raise ModelError(f"lora: {error}") from None
    else:
        if config.other_options:
            raise ModelError(f"lora: unknown keys {sorted(config.other_options)}")
        targets = _target_modules(anatomy, config.target_modules)
        peft_config = peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # a scale: PEFT divides it by r
            lora_dropout=config.dropout,
            target_modules=targets,
            layers_to_transform=_layers(config.layers, anatomy.num_blocks),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, peft_config)


def _target_modules(anatomy: Any, targets: list[str] | str) -> list[str] | str:
    if targets == "auto":
        return list(anatomy.family.linears)
    if isinstance(targets, str):
        return targets  # PEFT's own words: "all-linear", or a regular expression
    names = [name for name, module in anatomy.model.named_modules() if is_linear(module)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
            close = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the model has {', '.join(leaves)}"
            raise ModelError(f"lora.target_modules: {target!r} matches nothing: {hint}")
    return targets


def _layers(layers: str | list[int], num_blocks: int) -> list[int] | None:
    """``all``, ``last_n`` or a list of block indices, as PEFT wants them."""
    if layers == "all":
        return None
    if isinstance(layers, str):
        if not layers.startswith("last_") or not layers[5:].isdigit():
            raise ModelError(f"lora.layers={layers!r}: give all, last_<n>, or a list of block numbers")
        count = int(layers[5:])
        if not 1 <= count <= num_blocks:
            raise ModelError(f"lora.layers={layers!r}, but the model has {num_blocks} blocks")
        return list(range(num_blocks - count, num_blocks))
    outside = [layer for layer in layers if not 0 <= layer < num_blocks]
    if outside:
        raise ModelError(
            f"lora.layers: {outside} outside the model's {num_blocks} blocks (0..{num_blocks - 1})"
        )
    return list(layers)


def load_adapter(model: Any, folder: str, *, trainable: bool = False) -> Any:
    """Somebody's saved PEFT adapter on ``model``. Raises ModelError if it was made for another base's shapes."""
    import peft

    if not (Path(folder) / "adapter_config.json").exists() and Path(folder).exists():
        raise ModelError(f"{folder!r} has no adapter_config.json: it is not a PEFT adapter")
    check_recorded_base(model, Path(folder))
    try:
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"adapter {folder!r} does not fit this base model: {str(error).splitlines()[0]}"
        ) from error


def check_recorded_base(model: Any, folder: Path) -> None:
    """ModelError if the adapter names another base; where a copy lies does not matter, its name does."""
    config = folder / "adapter_config.json"
    recorded = json.loads(config.read_text()).get("base_model_name_or_path") if config.exists() else None
    name = getattr(model.config, "_name_or_path", None)
    if recorded and name and Path(recorded).name != Path(name).name:
        raise ModelError(
            f"adapter '{folder}' was made for base model {recorded!r}, this is {name!r}: load it on its own base (or "
            "correct base_model_name_or_path in its adapter_config.json, if this is the same model under another name)"
        )


def load_model(
    name_or_path: str = "embedded",
    *,
    lora: dict[str, Any] | LoraConfig | None = None,
    seed: int = 42,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """A causal LM, ready to train, and its tokenizer.

    Args:
        name_or_path: hub id, folder, ``embedded`` or ``random:<shape>``.
        lora: the ``lora`` block of a recipe; None leaves the model plain and fully trainable.
        seed: of the adapter's initialisation, and of a ``random:`` model's.
        options: the other keys of the ``model`` block (revision, adapter, dtype, device, ...).
    """
    config = ModelConfig(name_or_path=name_or_path, **options)
    model, tokenizer = load_base(config, seed=seed)
    return prepare_model(
        model, config, LoraConfig(**lora) if isinstance(lora, dict) else lora, seed=seed
    ), tokenizer


def prepare_model(model: Any, config: ModelConfig, lora: LoraConfig | None, *, seed: int) -> Any:
    """Adapter and activation checkpointing on a loaded base."""
    if config.adapter is not None:
        model = load_adapter(model, config.adapter, trainable=True)
    elif lora is not None:
        model = add_adapter(model, lora, seed=seed)
    if config.activation_checkpointing:
        # Reentrant checkpointing would give LoRA no gradients at all under a frozen embedding.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
