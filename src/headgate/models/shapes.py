"""Shapes of well-known models, for randomly initialised stand-ins in tests and benchmarks."""

from __future__ import annotations

from typing import Any

LLAMA_TINY = dict(
    model_type="llama",
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)

SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_TINY,
    "mistral": {**LLAMA_TINY, "model_type": "mistral"},
    "qwen2": {**LLAMA_TINY, "model_type": "qwen2"},
    "qwen3": {**LLAMA_TINY, "model_type": "qwen3", "head_dim": 16},
    "gemma2": {**LLAMA_TINY, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3": {**LLAMA_TINY, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {**LLAMA_TINY, "model_type": "phi3", "pad_token_id": 0},
    "gpt2": dict(model_type="gpt2", vocab_size=1024, n_embd=64, n_layer=4, n_head=4, n_positions=512),
    "gpt_neox": dict(
        model_type="gpt_neox",
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "qwen2-0.5b": dict(
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
    "gemma3-270m": dict(
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
    "tinyllama-1.1b": dict(
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
