"""``--to transformers``: one folder that loads with its routing where Headgate is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import peft
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig

from headgate.errors import ConfigError, ModelError
from headgate.methods.compose import methods_of
from headgate.models.anatomy import unwrap
from headgate.serving import MODELING, write_modeling
from headgate.serving.describe import describe_run
from headgate.serving.modeling import HeadgateConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

AUTO_MAP = {
    "AutoConfig": "modeling_headgate.HeadgateConfig",
    "AutoModelForCausalLM": "modeling_headgate.HeadgateForCausalLM",
}


def save_served(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    merge: bool = False,
    max_shard_size: str = "5GB",
) -> list[str]:
    """Weights, router or experts, configuration and the modeling file; returns notes.

    ``model`` is a loaded run (``headgate_methods`` attached). ``merge``: the adapter goes into the weights, which saves
    its products and changes logits by rounding; an adapter that is more than plain LoRA always does. Raises ConfigError
    for methods that cannot be served so.
    """
    notes: list[str] = []
    try:
        told, state = describe_run(_merged(model) if merge else model)
    except ModelError as error:
        notes.append(f"the adapter was merged into the weights: {error}")
        told, state = describe_run(_merged(model))
    base = unwrap(model)
    config = HeadgateConfig(text_config=base.config.to_dict(), headgate=told)
    # `transformers serve` looks its architecture up among transformers' own names; this one asks auto_map in turn.
    config.architectures, config.auto_map = ["AutoModelForCausalLM"], dict(AUTO_MAP)
    config.dtype = base.dtype
    config.tie_word_embeddings = base.config.tie_word_embeddings
    config.save_pretrained(folder)
    try:
        save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size}: {error}") from error
    write_modeling(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    return notes


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    """The adapter in the weights; the methods stay where they are described from."""
    if not isinstance(model, peft.PeftModel):
        return model
    methods = methods_of(model)
    for name, config in methods.configs().items():
        if getattr(config, "features", None) == "prepass":
            raise ConfigError(
                f"features: prepass of {name} runs the model without its adapter, which merging would mix in: "
                "leave --merge out"
            )
    whole = model.merge_and_unload()
    object.__setattr__(whole, "headgate_methods", methods)
    return whole


def load_written(folder: Path) -> nn.Module:
    """The exported model through the modeling file in the folder itself, whatever else is registered."""
    name = f"headgate_written_{abs(hash(str(folder)))}"
    spec = importlib.util.spec_from_file_location(name, folder / MODELING)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        config = module.HeadgateConfig.from_pretrained(folder)
        model: nn.Module = module.HeadgateForCausalLM.from_pretrained(folder, config=config).eval()
        return model
    finally:
        del sys.modules[name]
