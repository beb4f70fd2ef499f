"""The architectures that Headgate knows: one row per family, and ``register_family`` for any other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headgate.errors import ConfigError


@dataclass(frozen=True)
class Inside:
    """Names of a block's norms, in the order they act; ``fused``: one projection for q, k and v (GPT-2);
    ``softcap``: attention scores are capped (Gemma 2)."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None
    fused: bool = False
    softcap: bool = False


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts.

    Attribute paths: ``backbone`` in the causal LM, ``blocks``, ``embedding`` and ``final_norm`` in the backbone, ``attention``
    and ``mlp`` in a block. ``linears``: endings of the attention linears' names, for a default LoRA. ``inside``: a block's
    norms, without which layer_routing has no sparse engine for it and skips whole blocks only.
    """

    backbone: str = "model"
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    inside: Inside | None = None


SANDWICH = Inside(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
LLAMA_LIKE = Family(inside=Inside())
FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": Family(inside=replace(SANDWICH, softcap=True)),
    "gemma3_text": Family(inside=SANDWICH),
    "phi3": Family(linears=("qkv_proj", "o_proj")),
    "gpt2": Family(
        backbone="transformer",
        blocks="h",
        embedding="wte",
        final_norm="ln_f",
        attention="attn",
        linears=("c_attn", "attn.c_proj"),
        inside=Inside(before_attention="ln_1", before_mlp="ln_2", fused=True),
    ),
    "gpt_neox": Family(
        backbone="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        linears=("query_key_value", "attention.dense"),
    ),
}


def register_family(model_type: str, family: Family) -> None:
    """Describe an architecture by its config's ``model_type``, in this process.

    Raises ConfigError where the name is taken by another description: a model would silently be read otherwise than before.
    """
    known = FAMILIES.setdefault(model_type, family)
    if known != family:
        raise ConfigError(
            f"architecture {model_type!r} is described already, as {known}: leave register_family out"
        )
