"""Any PEFT configuration: every key reaches it, and what it does not have is said before a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from headgate.errors import ConfigError, ModelError
from headgate.experiments.preflight import check_recipe
from headgate.experiments.recipe_file import dump_recipe, parse_yaml, recipe_from
from headgate.models.load import load_model


def test_every_key_reaches_the_configuration() -> None:
    """``r`` and ``target_modules`` are LoRA's keys here too, and were once left out for every other kind."""
    model, _ = load_model(
        "embedded",
        device="cpu",
        lora={"peft_type": "loha", "r": 3, "alpha": 5, "target_modules": ["v_proj"], "rank_dropout": 0.1},
    )
    found = model.peft_config["default"]
    assert (found.r, found.alpha, found.target_modules, found.rank_dropout) == (3, 5, {"v_proj"}, 0.1)


@pytest.mark.parametrize("value", [8, 4])  # 8 is LoRA's default: given, it counts
def test_a_key_that_is_given_counts_and_survives_the_file(value: int) -> None:
    recipe = recipe_from({"lora": {"peft_type": "vera", "r": value}})
    again = recipe_from(parse_yaml(dump_recipe(recipe), "dumped"))
    assert again == recipe and again.run_id() == recipe.run_id()
    assert recipe.run_id() != recipe_from({"lora": {"peft_type": "vera"}}).run_id()
    assert again.lora is not None and again.lora.options == {"r": value}


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"q": 1}, r"lora\.q: unknown key"),
        ({"rank": 4}, r"lora\.rank: unknown key"),
        ({"options": {"r": 1}}, "options are another PEFT method's"),
        ({"peft_type": "lohaa"}, "lora.peft_type='lohaa' is no PEFT method: did you mean 'loha'"),
        ({"peft_type": "loha", "rank_drpout": 0.1}, "lora.rank_drpout: loha has no such key: did you mean 'rank_dropout'"),
        ({"peft_type": "ia3", "r": 4}, "lora.r: ia3 has no such key"),
    ],
)  # fmt: skip
def test_what_it_does_not_have_is_said_before_a_model_is_loaded(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_recipe(recipe_from({"lora": lora}))


@pytest.mark.parametrize(
    ("key", "said"), [({"target_modules": ["nope"]}, "nope"), ({"r": -3, "target_modules": ["v_proj"]}, "-3")]
)
def test_what_the_model_cannot_have_is_one_line(key: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load_model("embedded", device="cpu", lora={"peft_type": "loha", **key})
    assert "\n" not in str(caught.value)
