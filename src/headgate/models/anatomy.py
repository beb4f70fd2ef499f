"""Anatomy: where a causal language model keeps its blocks, linears, head and norms.

``families`` has one row per architecture; one without a row gets an error that says how to describe it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn

from headgate.errors import ModelError
from headgate.models.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_INPUTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "labels", "inputs_embeds", "token_type_ids"}
)
"""The columns of a batch that a causal LM itself takes; what methods add is left out of its call."""

Batch = Mapping[str, Any]
"""The columns of a micro-batch: tensors, and lists of what is no number."""
Columns = dict[str, Any]
"""A batch that is being made, or part of one."""


class BackboneOutput(Protocol):
    """What a backbone returns, of any family."""

    last_hidden_state: Tensor


def model_inputs(batch: Batch, *, labels: bool = True) -> Columns:
    """The part of a batch that the model is called with; without ``labels`` no loss is computed."""
    return {
        k: v for k, v in batch.items() if k in MODEL_INPUTS and v is not None and (labels or k != "labels")
    }


@dataclass(frozen=True)
class Anatomy:
    """The parts of one loaded model. ``model`` is the transformers model, PEFT wrappers taken off."""

    model: PreTrainedModel
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


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside data-parallel and PEFT wrappers, or inside an exported model with its routing."""
    inner: Any = model  # what wrappers add is known at run time alone
    while hasattr(inner, "module") and not hasattr(inner, "config"):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    elif getattr(getattr(inner, "config", None), "model_type", None) == "headgate":
        inner = inner.base
    return cast("PreTrainedModel", inner)


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a causal LM. Raises ModelError for an unknown architecture, saying how to add it."""
    base: Any = unwrap(model)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"architecture {config.model_type!r} is not known. Known: {', '.join(sorted(FAMILIES))}. "
            "Describe it with headgate.models.register_family(model_type, Family(backbone=..., blocks=..., embedding=..., "
            "final_norm=..., attention=..., mlp=...)): attribute paths, see headgate/models/families.py"
        )
    try:
        backbone = base.get_submodule(family.backbone)
        blocks = list(backbone.get_submodule(family.blocks))
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
