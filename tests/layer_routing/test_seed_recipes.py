"""The recipes of exp1 to exp8 carry the original's numbers: costs, sweeps, rows, targets and rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headgate.errors import ConfigError
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import load_recipe
from headgate.methods.layer_routing import LayerRouting, LayerRoutingConfig

FOLDER = Path(__file__).parents[2] / "recipes" / "layer_routing"
CHAT = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def recipe_of(name: str) -> Recipe:
    (file,) = (path for path in FOLDER.glob(f"{name}_*.yaml") if not path.stem.endswith("_embedded"))
    return load_recipe(file)


def routing_of(name: str) -> LayerRoutingConfig:
    return LayerRoutingConfig(**recipe_of(name).methods["layer_routing"])


@pytest.mark.parametrize("name", [f"exp{number}" for number in range(1, 9)])
def test_every_experiment_trains_the_chat_model(name: str) -> None:
    assert recipe_of(name).model.name_or_path == CHAT


@pytest.mark.parametrize(("name", "rows", "after"), [("exp3", 2500, 3000), ("exp5", 500, 600)])
def test_reinforce_on_ag_news(name: str, rows: int, after: int) -> None:
    recipe = recipe_of(name)
    assert recipe.lora is not None and recipe.data.validation is not None
    assert (recipe.lora.r, recipe.lora.target_modules) == (8, ["q_proj", "v_proj"])
    assert recipe.data.train.split == f"train[:{rows}]"
    assert recipe.data.validation.split == f"train[{rows}:{after}]"
    assert recipe.training.learning_rate == 5e-5 and recipe.data.max_length == 128
    config = routing_of(name)
    assert (config.policy, config.features, config.budget, config.kd) == (
        "reinforce",
        "embedding",
        "penalty",
        False,
    )
    assert config.budget_weight == 0.05 and config.router_lr == 5e-5
    assert config.calibration_target is None, "p > .5 at inference"


def test_sweeps_reach_the_last_of_the_originals_points() -> None:
    exp5, exp7 = recipe_of("exp5").sweep, recipe_of("exp7").sweep
    assert exp5 is not None and exp7 is not None
    key = "methods.layer_routing.budget_weight"
    assert exp5.grid[key] == [0.01, 0.02, 0.05, 0.10, 0.25]
    original = [0.005, 0.01, 0.02, 0.05, 0.10, 0.20, 0.40]
    assert exp7.grid[key] == pytest.approx([price * 2 / 18 for price in original], rel=0.02)


@pytest.mark.parametrize("name", ["exp1", "exp2", "exp6", "exp7", "exp8"])
def test_wikitext(name: str) -> None:
    recipe, training = recipe_of(name), recipe_of(name).training
    assert recipe.lora is not None and recipe.data.train.limit == 10_000
    assert (recipe.lora.r, recipe.lora.alpha) == (16, 32)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert (training.learning_rate, training.lr_scheduler, training.epochs) == (3e-5, "cosine", 3)


def test_gumbel_has_the_originals_price_and_teacher() -> None:
    config = routing_of("exp6")
    assert (config.granularity, config.features, config.kd_weight, config.kd_warmup) == (
        "sample",
        "block",
        0.5,
        50,
    )
    # lambda sum_l w_l over 18 blocks, w rising from 0 to 1: the original's 1.0 for all gates open
    assert config.budget_weight * 9 == pytest.approx(1.0) and config.calibration_target is None


def test_what_is_given_beats_the_preset() -> None:
    config: Any = LayerRoutingConfig(preset="seed", policy="reinforce", budget_weight=0.25)
    assert config.budget_weight == 0.25 and config.features == "embedding"
    with pytest.raises(ConfigError, match=r"preset: seed has no policy 'topk'"):
        LayerRouting(preset="seed", policy="topk")
