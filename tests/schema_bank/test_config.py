"""Bad input is refused with the value and the cure; presets and stages are data."""

from __future__ import annotations

import warnings

import pytest

from headgate.errors import ConfigError
from headgate.methods.schema_bank import SchemaBank, SchemaBankConfig
from headgate.methods.stage import schedule_stages


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_schemas": 2, "top_k": 4}, "top_k=4 exceeds num_schemas=2: lower top_k"),
        ({"stage_shares": [0.5, 0.5, 0.5]}, "sum to 1.5, not 1"),
        ({"stage_shares": [0.5, 0.5]}, "2 entries, curriculum 'three' has 3"),
        ({"tags": "none", "lambda_tag": 1.0}, "no tag source"),
        ({"tag_schedule": [1.5]}, "between 0 and 1"),
        ({"tag_schedule": []}, "empty list"),
        ({"layers": "first_2"}, "write last_2"),
        ({"stage_shares": [0.2, 0.6, 0.2], "stage_steps": [1, 1, 1]}, "not both"),
        ({"topk": 2}, "topk"),
    ],
)
def test_bad_settings_name_value_and_cure(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace(".", r"\.")):
        SchemaBank(**options)


@pytest.mark.parametrize("layers", [[7], [-5], [0, 0], "last_9", []])
def test_layers_outside_the_model_are_refused(layers: object) -> None:
    with pytest.raises(ConfigError, match="layers="):
        SchemaBankConfig(layers=layers).blocks(4)


def test_layers_are_counted_from_either_end() -> None:
    assert SchemaBankConfig(layers="last_2").blocks(4) == [2, 3]
    assert SchemaBankConfig(layers=[-1, 0]).blocks(4) == [0, 3]
    assert SchemaBankConfig(layers="all").blocks(3) == [0, 1, 2]


def test_without_a_router_stage_the_schemas_train_alone_for_two_thirds_and_then_with_the_router() -> None:
    stages = schedule_stages(SchemaBankConfig(curriculum="two").stages(1e-4), 300)
    assert [(s.name, s.start, s.stop) for s in stages] == [("schemas", 0, 200), ("joint", 200, 300)]
    assert [s.stage.train["schema_bank"] for s in stages] == [1e-4, 5e-5]


def test_default_stages_are_the_table() -> None:
    stages = schedule_stages(SchemaBankConfig().stages(1e-4), 100)
    assert [(s.name, s.start, s.stop) for s in stages] == [
        ("router", 0, 25),
        ("schemas", 25, 75),
        ("joint", 75, 100),
    ]
    assert stages[0].stage.train == {"schema_router": pytest.approx(1e-3)}
    assert stages[1].stage.train == {"schema_bank": 1e-4, "lora": 1e-4}
    assert stages[2].stage.train == dict.fromkeys(("schema_router", "schema_bank", "lora"), 5e-5)
    assert [s.stage.options["tags"] for s in stages] == [True, False, False]
    assert [s.stage.options["orth"] for s in stages] == [False, True, True]


def test_a_stage_too_short_for_a_step_is_refused() -> None:
    with pytest.raises(ConfigError):
        schedule_stages(SchemaBankConfig().stages(1e-4), 2)


def test_controls_drop_what_they_freeze_and_shares_still_fill_the_run() -> None:
    for options in ({"router": "frozen"}, {"router": "uniform"}):
        stages = SchemaBankConfig(**options).stages(1e-4)
        assert [s.name for s in stages] == ["schemas", "joint"]
        assert sum(s.share or 0 for s in stages) == pytest.approx(1)
        assert all("schema_router" not in s.train for s in stages)
    frozen = SchemaBankConfig(bank="frozen").stages(1e-4)
    assert [list(s.train) for s in frozen] == [["schema_router"], ["lora"], ["schema_router", "lora"]]
    assert [s.name for s in SchemaBankConfig(curriculum="joint").stages(1e-4)] == ["joint"]


def test_presets_are_the_original_readings() -> None:
    released, paper = SchemaBankConfig(preset="released"), SchemaBankConfig(preset="paper")
    assert (released.combine, released.lambda_tag, released.tag_prefix) == ("replace", 0.0, True)
    assert (paper.gating, paper.attributes, paper.reduction) == ("raw", "router", "frobenius")


def test_an_overridden_preset_warns_and_is_recorded() -> None:
    with pytest.warns(UserWarning, match="combine='add'"):
        method = SchemaBank(preset="released", combine="add")
    assert method.structure()["preset_deviations"] == {"combine": "add"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SchemaBank(preset="released").structure()["preset_deviations"] == {}
        SchemaBankConfig(**SchemaBankConfig(preset="paper").model_dump())


def test_evaluation_routing_is_checked() -> None:
    with pytest.raises(ConfigError, match="not one of removed, on, all, dense"):
        SchemaBank().set_routing("sideways")
    with pytest.raises(ConfigError, match="saved without one"):
        SchemaBank().set_routing("on")
