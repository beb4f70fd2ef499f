"""Comparisons: paired by construction, tuned alike, equal time fixed once, restarts that only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from headgate.cli.compare import verdict_lines
from headgate.errors import ConfigError, TrainingError
from headgate.experiments.arms import arm_recipes
from headgate.experiments.compare import Comparison
from headgate.experiments.markdown import markdown
from headgate.experiments.recipe_file import recipe_from
from headgate.experiments.tuning import ADVICE, on_edge, tuned_to
from tests.experiments.test_sweep import InProcess


def recipe(folder: Path, compare: dict[str, Any], **changes: Any) -> Any:
    return recipe_from(
        {
            "name": "cmp",
            "output_dir": str(folder),
            "model": {"name_or_path": "random:llama", "device": "cpu"},
            "lora": {"dropout": 0.0},
            "data": {
                "train": {"source": "wordmath", "limit": 40},
                "validation": {"source": "wordmath", "split": "validation", "limit": 4},
                "max_length": 256,
            },
            "training": {"max_steps": 3, "per_device_train_batch_size": 2, "save_every": 3, "eval_every": 3},
            "evaluation": [{"task": "perplexity", "source": "wordmath", "limit": 6, "lengths": [256]}],
            "compare": compare,
            **changes,
        }
    )


ARMS = {"base": {"training": {"max_steps": 0}}, "lora": {}, "same": {}, "longer": {"equal_time": "lora"}}


@pytest.mark.parametrize(
    ("value", "tried", "edge"),
    [
        (0.1, [0.01, 0.1, 1.0], False),
        (0.01, [1.0, 0.01, 0.1], True),
        (1e-3, [1e-1, 1e-3], True),
        (3, [3], True),
        ("cosine", ["linear", "cosine"], False),
    ],
)
def test_an_optimum_on_the_edge_of_its_grid_is_said(value: Any, tried: list[Any], edge: bool) -> None:
    tuned = {"value": value, "scores": {str(one): 1.0 for one in tried}}
    assert on_edge(tuned) == edge
    assert ("the edge of its grid" in tuned_to(tuned)) == edge


def test_words_can_be_tuned_as_well_as_numbers(tmp_path: Path) -> None:
    """The table is written after all runs: what cannot be printed there loses nothing but is found too late."""
    tune = {"arms": ["lora"], "key": "training.lr_scheduler", "values": ["linear", "constant"]}
    report = Comparison(recipe(tmp_path, {"seeds": [1], "arms": {"lora": {}}, "tune": tune})).execute()
    chosen = report["arms"]["lora"]["tuned"]["value"]
    assert f"lora {chosen}." in markdown(report)
    assert f"lora: training.lr_scheduler tuned to {chosen} on validation" in verdict_lines(report)


def test_a_comparison_from_end_to_end(tmp_path: Path) -> None:
    compare = {
        "seeds": [1, 2, 3],
        "arms": ARMS,
        "tune": {"arms": ["lora"], "values": [1e-3, 1e-1], "overrides": {"data.validation.limit": 2}},
        "contrasts": [["base", "lora"], ["longer", "base"]],
    }
    first = Comparison(recipe(tmp_path, compare)).execute()
    arms = first["arms"]
    assert len(arms["lora"]["values"]) == 3 and first["metric"] == "evaluation.perplexity_wordmath.loss"
    assert len(set(arms["base"]["runs"].values())) == 1, "an arm without training runs once"
    assert arms["lora"]["tuned"]["value"] in (1e-3, 1e-1) and len(arms["lora"]["tuned"]["scores"]) == 2
    assert "the edge of its grid" in markdown(first) and ADVICE in verdict_lines(first)
    assert arms["longer"]["equal_time"]["steps"] >= 1 and arms["same"]["tuned"] is None
    base = first["contrasts"]["base"]
    assert base["t"]["low"] <= base["t"]["mean"] <= base["t"]["high"] and base["holm_p"] >= base["t"]["p"]
    pair, other = first["pairs"]["base - lora"], first["pairs"]["longer - base"]
    assert pair["t"] == base["t"]
    assert other["differences"] == [
        b - a for a, b in zip(arms["base"]["values"], arms["longer"]["values"], strict=True)
    ]
    recipes = [yaml.safe_load(file.read_text()) for file in tmp_path.glob("cmp/*-s*/recipe.yaml")]
    rows = {(content["seed"] == 7, content["data"]["validation"]["limit"]) for content in recipes}
    assert rows == {(True, 2), (False, 4)}, "overrides hold in the tuning runs alone"
    told: list[str] = []
    again = Comparison(recipe(tmp_path, compare), say=told.append).execute()
    assert again == first and told == [], "a complete comparison runs nothing and says the same"


def test_pairing_gives_equal_arms_equal_results(tmp_path: Path) -> None:
    """Two arms that differ in nothing that acts see the same initialisation, order, items, and end alike."""
    arms = {"lora": {}, "other": {"training": {"weight_decay": 0.01, "warmup": 0.05}}}
    found = Comparison(recipe(tmp_path, {"seeds": [1, 2], "arms": arms})).execute()
    assert found["arms"]["lora"]["values"] == found["arms"]["other"]["values"]
    assert found["contrasts"]["other"]["t"] is None
    assert found["contrasts"]["other"]["verdict"].startswith("no interval")


def test_a_killed_comparison_ends_in_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headgate.experiments import compare as module

    compare = {"seeds": [1, 2], "arms": {"lora": {}, "big": {"lora": {"r": 16}}}}
    whole = Comparison(recipe(tmp_path / "whole", compare)).execute()
    real, count = module.run, [0]

    def dies(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        Comparison(recipe(tmp_path / "cut", compare)).execute()
    again = Comparison(recipe(tmp_path / "cut", compare)).execute()
    for name in ("lora", "big"):
        assert again["arms"][name]["values"] == whole["arms"][name]["values"]
    assert (
        json.loads((Comparison(recipe(tmp_path / "cut", compare)).folder / "comparison.json").read_text())
        == again
    )


def test_a_stream_is_told_skill_by_skill(tmp_path: Path) -> None:
    """What each arm knows of every skill at the end, and what it lost, are means over seeds; in the table as well."""

    def skill(name: str) -> dict[str, Any]:
        rows = {"source": "wordmath", "options": {"families": [name]}}
        held_out = {**rows, "split": "validation", "limit": 2}
        return {"skill": name, **rows, "limit": 8, "steps": 1, "validation": held_out}

    found = Comparison(
        recipe(
            tmp_path,
            {"seeds": [1, 2], "metric": "continual.average", "arms": {"base": ARMS["base"], "lora": {}}},
            data={"stream": [skill("farm"), skill("sports")], "max_length": 256},
            training={"max_steps": 2, "per_device_train_batch_size": 2, "eval_every": 100},
            evaluation=[],
        )
    )
    report = found.execute()
    streams = {name: arm["continual"] for name, arm in report["arms"].items()}
    results = [
        json.loads((Path(path) / "result.json").read_text())["continual"]
        for path in report["arms"]["lora"]["runs"].values()
    ]
    for figure in ("average", "backward_transfer", "forgetting", "forward_transfer"):
        assert streams["lora"][figure] == pytest.approx(sum(one[figure] for one in results) / 2)
        assert streams["base"][figure] == pytest.approx(
            report["arms"]["base"]["mean"] if figure == "average" else 0
        )
    assert streams["lora"]["skills"]["sports"] == pytest.approx(
        sum(one["matrix"][-1][1] for one in results) / 2
    )
    table = (found.folder / "comparison.md").read_text()
    assert "| arm | farm | sports | average | backward transfer | forgetting | forward transfer |" in table
    assert f"| lora | {streams['lora']['skills']['farm']:.3f} |" in table


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"arms": {"a": {}, "b": {"evaluation": []}}}, "evaluated on different items"),
        ({"arms": {}}, "compare.arms is empty"),
        ({"arms": {"a": {"lorra": {}}}}, r"compare.arms.a: lorra: unknown key: did you mean 'lora'"),
        ({"arms": {"a": {}}, "baseline": "b"}, "there is no arm 'b'"),
        ({"arms": {"a": {}}, "metric": "accuracy"}, "name an evaluation"),
        ({"arms": {"a": {}, "b": {"equal_time": "c"}}}, "there is no arm 'c'"),
        ({"arms": {"a": {}}, "seeds": [7], "tune": {"values": [1e-3]}}, "tune at another seed"),
    ],
)
def test_bad_comparisons_are_refused_before_anything_runs(
    tmp_path: Path, compare: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Comparison(recipe(tmp_path, compare)).execute()
    assert not list(tmp_path.iterdir())


def test_arms_override_methods_wholly(tmp_path: Path) -> None:
    bank = {"schema_bank": {"num_schemas": 4, "tags": "none"}}
    arms = {"plain": {"methods": {}}, "bank": {"methods": {"schema_bank": {"top_k": 1}}}}
    made = arm_recipes(recipe(tmp_path, {"arms": arms}, methods=bank))
    assert made["plain"].methods == {}
    assert made["bank"].methods["schema_bank"]["num_schemas"] == 4
    assert made["bank"].methods["schema_bank"]["top_k"] == 1


def test_a_recipe_without_arms_is_refused(tmp_path: Path) -> None:
    plain = recipe(tmp_path, {"arms": {"a": {}}}).model_copy(update={"compare": None})
    with pytest.raises(ConfigError, match="no compare: section"):
        Comparison(plain)


def test_an_executor_gives_the_same_comparison(tmp_path: Path) -> None:
    """In whatever order and process the runs end, the figures are those of one run after the other."""
    compare = {"seeds": [1, 2], "arms": {"base": ARMS["base"], "lora": {}, "longer": {"equal_time": "lora"}}}
    compare["tune"] = {"arms": ["lora"], "values": [1e-3, 1e-1]}
    here = Comparison(recipe(tmp_path / "a", compare)).execute()
    there_executor = InProcess()
    there = Comparison(recipe(tmp_path / "b", compare), executor=there_executor).execute()
    for name in ("base", "lora"):
        assert there["arms"][name]["values"] == here["arms"][name]["values"]
        assert list(there["arms"][name]["runs"]) == list(here["arms"][name]["runs"])
    assert len(there_executor.executed) == len(set(there_executor.executed)), "an untrained arm runs once"


def test_a_run_that_fails_in_a_pool_ends_the_comparison_with_its_log(tmp_path: Path) -> None:
    arms = {"lora": {}, "bad": {"data": {"max_length": 9}}}
    with pytest.raises(TrainingError, match=r"bad, seed 1 ended without a result: see .*\.log"):
        Comparison(recipe(tmp_path, {"seeds": [1], "arms": arms}), executor=InProcess()).execute()


def test_a_contrast_of_an_unknown_arm_is_refused(tmp_path: Path) -> None:
    compare = {"seeds": [1], "arms": {"lora": {}, "other": {}}, "contrasts": [["lora", "othr"]]}
    with pytest.raises(ConfigError, match="there is no arm 'othr'"):
        Comparison(recipe(tmp_path, compare))
