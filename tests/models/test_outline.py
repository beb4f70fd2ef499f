"""The outline of a model without torch says what the model on the meta device says, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headgate.errors import HeadgateError
from headgate.experiments import model_outline
from headgate.experiments.model_outline import built, context_length, outlined
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import recipe_from
from headgate.models.anatomy import is_linear, linear_size
from headgate.models.config import ModelConfig
from headgate.models.outline import outline
from headgate.models.shapes import LLAMA_TINY, SHAPES

WRITTEN: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "biased llama": {"attention_bias": True, "mlp_bias": True},
    "biased qwen3": {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
    "qwen2 of the hub": {
        "model_type": "qwen2", "max_window_layers": 4, "sliding_window": 512, "use_sliding_window": False,
        "torch_dtype": "bfloat16", "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu",
    },
    "wide heads": {"head_dim": 48, "num_key_value_heads": 4},
}  # fmt: skip
STRANGE: dict[str, dict[str, Any]] = {
    "another architecture": {"model_type": "gemma2"},
    "unknown key": {"expert_count": 8},
    "scaled rope": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    "heads that do not divide": {"num_attention_heads": 5},
    "text for a number": {"hidden_size": "64"},
    "yes for a number": {"num_hidden_layers": True},
    "padding outside": {"pad_token_id": 5000},
    "quantised": {"quantization_config": {"quant_method": "fp8"}},
    "biased mistral": {"model_type": "mistral", "attention_bias": True},
    "another activation": {"hidden_act": "gelu"},
}


def saved(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA_TINY, **changes}))
    return str(folder)


def same(name: str) -> None:
    found = outline(ModelConfig(name_or_path=name))
    recipe = recipe_from({"model": {"name_or_path": name}})
    model = built(recipe)
    assert found is not None
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.linears == {n: linear_size(m) for n, m in model.named_modules() if is_linear(m)}
    config = model.config
    assert (found.hidden_size, found.num_blocks) == (config.hidden_size, config.num_hidden_layers)
    assert (found.vocab_size, found.context_length) == (config.vocab_size, config.max_position_embeddings)


@pytest.mark.parametrize(
    "name", ["embedded", *(f"random:{s}" for s in SHAPES if not s.startswith(("gemma", "gpt", "phi")))]
)
def test_it_is_the_model_on_the_meta_device(name: str) -> None:
    same(name)


@pytest.mark.parametrize("changes", WRITTEN.values(), ids=WRITTEN)
def test_a_config_of_ones_own(changes: dict[str, Any], tmp_path: Path) -> None:
    same(saved(tmp_path, **changes))


@pytest.mark.parametrize("changes", STRANGE.values(), ids=STRANGE)
def test_what_is_not_known_is_not_guessed(changes: dict[str, Any], tmp_path: Path) -> None:
    assert outline(ModelConfig(name_or_path=saved(tmp_path, **changes))) is None


@pytest.mark.parametrize("missing", ["hidden_size", "num_key_value_heads", "model_type"])
def test_what_is_missing_is_not_guessed(missing: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA_TINY.items() if k != missing}))
    assert outline(ModelConfig(name_or_path=str(tmp_path))) is None


@pytest.mark.parametrize("name", ["owner/model", "random:gpt2", "random:nope", "random:gone.json", "/gone"])
def test_a_model_that_is_not_here_or_of_another_kind(name: str) -> None:
    assert outline(ModelConfig(name_or_path=name)) is None


def told(recipe: Recipe) -> str:
    try:
        found = outlined(recipe)
    except HeadgateError as error:
        return f"{type(error).__name__}: {error}"
    assert found is not None
    return f"{found.parameters} {found.trainable} {found.context_length}"


@pytest.mark.parametrize(
    "lora",
    [
        None, {"r": 3}, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "q_proj"]},
        {"layers": [0, 0, 3]}, {"layers": "last_2"}, {"use_dora": True}, {"use_rslora": True},
        {"target_modules": "all-linear"}, {"target_modules": ["lm_head"]}, {"target_modules": r".*\.0\..*q_proj"},
        {"target_modules": ["self_attn.q_proj"]}, {"target_modules": []}, {"layers": []},
        {"target_modules": ["q_projj"]}, {"target_modules": ["zzz"]}, {"r": 4096}, {"r": 129, "target_modules": ["v_proj"]},
        {"layers": "last_9"}, {"layers": "lst"}, {"layers": [8]}, {"layers": [-1]}, {"peft_type": "ia3"},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_is_counted_and_refused_alike(
    lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from({"lora": lora})
    quick = told(recipe)
    monkeypatch.setattr(model_outline, "outline", lambda _model: None)
    assert quick == told(recipe)


def test_the_context_is_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from({})
    quick = context_length(recipe)
    monkeypatch.setattr(model_outline, "outline", lambda _model: None)
    assert quick == context_length(recipe) == 512
