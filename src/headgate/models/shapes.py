"""Shapes of well-known models, for randomly initialised stand-ins in tests and benchmarks."""

from __future__ import annotations

from typing import TypedDict


class Shape(TypedDict, total=False):
    """The keys of a ``config.json`` that say how large a model is, and those that an outline reads besides."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: int
    max_position_embeddings: int
    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int
    pad_token_id: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool


LLAMA_TINY = Shape(
    model_type="llama",
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)

SHAPES: dict[str, Shape] = {
    "llama": LLAMA_TINY,
    "mistral": {**LLAMA_TINY, "model_type": "mistral"},
    "qwen2": {**LLAMA_TINY, "model_type": "qwen2"},
    "qwen3": {**LLAMA_TINY, "model_type": "qwen3", "head_dim": 16},
    "gemma2": {**LLAMA_TINY, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3": {**LLAMA_TINY, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {**LLAMA_TINY, "model_type": "phi3", "pad_token_id": 0},
    "gpt2": Shape(model_type="gpt2", vocab_size=1024, n_embd=64, n_layer=4, n_head=4, n_positions=512),
    "gpt_neox": Shape(
        model_type="gpt_neox",
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "qwen2-0.5b": Shape(
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "gemma3-270m": Shape(
        model_type="gemma3_text",
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
    ),
    "tinyllama-1.1b": Shape(
        model_type="llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    ),
}
