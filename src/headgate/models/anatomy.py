"""Anatomy: where a causal language model keeps its blocks, linears, head and norms.

One table row per family. A family that is not in the table gets an error that says how to describe it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headgate.errors import ModelError

MODEL_INPUTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "labels", "inputs_embeds", "token_type_ids"}
)
"""The columns of a batch that a causal LM itself takes; what methods add is left out of its call."""


@dataclass(frozen=True)
class Family:
    """Attribute paths of an architecture: ``backbone`` in the causal LM, the others in the backbone."""

    backbone: str = "model"
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    parallel_residual: bool = False
    linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


LLAMA_LIKE = Family()
FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE,
    "phi3": Family(linears=("qkv_proj", "o_proj")),
    "gpt2": Family(
        backbone="transformer",
        blocks="h",
        embedding="wte",
        final_norm="ln_f",
        attention="attn",
        linears=("c_attn", "attn.c_proj"),
    ),
    "gpt_neox": Family(
        backbone="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        parallel_residual=True,
        linears=("query_key_value", "attention.dense"),
    ),
}


def register_family(model_type: str, family: Family) -> None:
    """Describe an architecture that Headgate does not know, by its config's ``model_type``."""
    FAMILIES[model_type] = family


@dataclass(frozen=True)
class Anatomy:
    """The parts of one loaded model. ``model`` is the transformers model, PEFT wrappers taken off."""

    model: nn.Module
    family: Family
    backbone: nn.Module
    embedding: nn.Module
    blocks: Sequence[nn.Module]
    final_norm: nn.Module
    head: nn.Module
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    softcap: float | None

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def tied_head(self) -> bool:
        return getattr(self.head, "weight", None) is getattr(self.embedding, "weight", object())

    def attention(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.family.attention)

    def mlp(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.family.mlp)

    def linears(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """``(name within the block, linear)``; a PEFT-wrapped linear is named by its wrapper."""
        wrapped: list[str] = []
        for name, module in block.named_modules():
            if any(name.startswith(outer + ".") for outer in wrapped):
                continue
            if hasattr(module, "base_layer"):
                wrapped.append(name)
                yield name, module
            elif is_linear(module):
                yield name, module


def is_linear(module: nn.Module) -> bool:
    """A linear map, quantised ones and GPT-2's Conv1D included."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_size(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map; PEFT's wrapper is looked through, Conv1D keeps its weight transposed."""
    base: Any = getattr(module, "base_layer", module)
    if type(base).__name__ == "Conv1D":
        return base.weight.shape[0], base.weight.shape[1]
    return base.in_features, base.out_features


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside data-parallel and PEFT wrappers, or inside an exported model with its routing."""
    while hasattr(model, "module") and not hasattr(model, "config"):
        model = model.module
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    if getattr(getattr(model, "config", None), "model_type", None) == "headgate":
        return model.base
    return model


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a causal LM. Raises ModelError for an unknown architecture, saying how to add it."""
    base: Any = unwrap(model)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"architecture {config.model_type!r} is not known. Known: {', '.join(sorted(FAMILIES))}. "
            "Describe it with headgate.models.register_family(model_type, Family(backbone=..., blocks=..., embedding=..., "
            "final_norm=..., attention=..., mlp=...)): attribute paths, see headgate/models/anatomy.py"
        )
    try:
        backbone = base.get_submodule(family.backbone)
        blocks = list(backbone.get_submodule(family.blocks))  # type: ignore[call-overload]
        embedding = backbone.get_submodule(family.embedding)
        final_norm = backbone.get_submodule(family.final_norm)
        head = base.get_output_embeddings()
        blocks[0].get_submodule(family.attention)
        blocks[0].get_submodule(family.mlp)
    except (AttributeError, IndexError) as error:
        raise ModelError(f"{type(base).__name__} does not fit its family {family}: {error}") from None
    if head is None:
        raise ModelError(f"{type(base).__name__} has no language-model head: use a ...ForCausalLM model")
    heads = config.num_attention_heads
    hidden = config.hidden_size
    return Anatomy(
        model=base,
        family=family,
        backbone=backbone,
        embedding=embedding,
        blocks=blocks,
        final_norm=final_norm,
        head=head,
        hidden_size=hidden,
        intermediate_size=getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * hidden,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None) or 1 << 30,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
