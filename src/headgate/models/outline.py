"""A model's parameters and linears by its config.json alone, without torch: for architectures of the Llama kind.

Nothing is guessed. A config with a key or a value that is not known here gives None, and who asks builds the model on the
meta device instead, which is the truth and takes seconds of imports. ``tests/models/test_outline.py`` holds both together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from headgate.models.config import ModelConfig
from headgate.models.places import EMBEDDED
from headgate.models.shapes import SHAPES, Shape

Sizes = dict[str, tuple[int, int]]
"""Linears by name: inputs and outputs."""


def _count(value: object) -> bool:
    return type(value) is int and value > 0


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _rope(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"rope_theta", "rope_type"}
        and value["rope_type"] == "default"
        and _number(value["rope_theta"])
    )


NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
KNOWN: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys((*NEEDED, "head_dim", "max_window_layers"), _count),
    **dict.fromkeys(("attention_dropout", "initializer_range", "rms_norm_eps", "rope_theta"), _number),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias"), lambda v: type(v) is bool),
    **dict.fromkeys(("dtype", "torch_dtype"), lambda v: v in ("float32", "bfloat16", "float16")),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), lambda v: v is None or type(v) is int),
    "architectures": lambda v: isinstance(v, list),
    "hidden_act": lambda v: v == "silu",
    "model_type": lambda v: v in ("llama", "mistral", "qwen2", "qwen3"),
    "pretraining_tp": lambda v: v == 1,
    "rope_parameters": _rope,
    "sliding_window": lambda v: v is None or _count(v),
    "transformers_version": lambda v: isinstance(v, str),
    "use_sliding_window": lambda v: v is False,
}  # fmt: skip
"""Keys that a config may have here, and which of their values."""


@dataclass(frozen=True)
class Outline:
    """What a plan asks of a model: how large it is, and which linears an adapter could sit on."""

    parameters: int
    linears: Sizes
    hidden_size: int
    num_blocks: int
    vocab_size: int
    context_length: int


def outline(model: ModelConfig) -> Outline | None:
    """The outline of a model that is on this machine; None where its config says more than is known here."""
    config = _config(model.name_or_path)
    if config is None or not set(NEEDED) < set(config) <= set(KNOWN):
        return None
    if not all(KNOWN[key](value) for key, value in config.items()) or not _fits(config):
        return None
    hidden, blocks, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    block, rest = _block(config)
    linears = {f"model.layers.{i}.{name}": size for i in range(blocks) for name, size in block.items()}
    inside = sum(inputs * outputs for inputs, outputs in block.values()) + rest
    ends = vocabulary * hidden * (1 if config.get("tie_word_embeddings", False) else 2) + hidden
    return Outline(
        parameters=blocks * inside + ends,
        linears={**linears, "lm_head": (hidden, vocabulary)},
        hidden_size=hidden,
        num_blocks=blocks,
        vocab_size=vocabulary,
        context_length=config["max_position_embeddings"],
    )


def _config(name: str) -> Shape | None:
    """The content of the config of a folder, of the embedded model or of a random one; None where there is none here."""
    shape = name.removeprefix("random:")
    if name.startswith("random:") and shape in SHAPES:
        return SHAPES[shape]
    place = EMBEDDED / "config.json" if name == "embedded" else Path(shape)
    file = place if name.startswith("random:") or name == "embedded" else place / "config.json"
    try:
        content: Shape = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _fits(config: Shape) -> bool:
    """Whether heads divide as every architecture here wants them, and the padding token is one of the vocabulary."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config["num_key_value_heads"]
    kind, pad = config.get("model_type"), config.get("pad_token_id")
    if kind is None or hidden % heads or heads % groups or (kind == "qwen3" and "head_dim" not in config):
        return False
    if kind not in ("llama", "qwen3") and config.get("attention_bias"):
        return False
    return (kind == "llama" or not config.get("mlp_bias")) and (
        pad is None or 0 <= pad < config["vocab_size"]
    )


def _block(config: Shape) -> tuple[Sizes, int]:
    """The linears of one block, and how many parameters it has beside their weights: biases and norms."""
    hidden, inner, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    attention = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
    }
    mlp = {
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    rest = 2 * hidden + (2 * size if kind == "qwen3" else 0)
    if kind == "qwen2" or config.get("attention_bias"):
        rest += queries + 2 * keys + (0 if kind == "qwen2" else hidden)
    if config.get("mlp_bias"):
        rest += 2 * inner + hidden
    return {**attention, **mlp}, rest
