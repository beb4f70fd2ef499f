"""Recipes: strict keys with a cure, inheritance, overrides, aliases, and a run id that names the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from headgate.errors import ConfigError
from headgate.experiments.recipe_file import (
    dump_recipe,
    load_recipe,
    merge,
    parse_yaml,
    read_content,
    recipe_from,
    recipe_of_content,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainin: {}", r"trainin: unknown key: did you mean 'training'"),
        ("training: {learning_rte: 1}", r"training.learning_rte: unknown key: did you mean 'learning_rate'"),
        ("data: {train: {limitt: 1}}", r"data.train.limitt: unknown key: did you mean 'limit'"),
        (
            "evaluation: [{task: perplexity, lenghts: [1]}]",
            r"evaluation.0.lenghts: unknown key: did you mean 'lengths'",
        ),
        ("training: {warmup_ratio: 0.1}", r"training.warmup_ratio: this name is gone; use training.warmup"),
        ("training: {evaluation_strategy: steps}", r"this name is gone; use training.eval_every"),
        ("training: {group_by_length: true}", r"use data.group_by_length"),
        ("training: {max_steps: many}", r"training.max_steps: .*integer.*'many'"),
        ("training: {learning_rate: -1}", r"training.learning_rate: .*greater than 0.*-1"),
        ("training: {epochs: 1, max_steps: 5}", r"one of epochs and max_steps"),
        (
            "methods: {backward_gate: {scor: loss}}",
            r"r.yaml: methods.backward_gate.scor: unknown key: did you mean 'score'",
        ),
        (
            "methods: {backward_gate: {target_acceptance: 1.5}}",
            r"r.yaml: methods.backward_gate.target_acceptance: should be less than or equal to 1 \(got 1.5\)",
        ),
        (
            "methods: {lora_experts: {spawn: {polcy: x}}}",
            r"methods.lora_experts.spawn.polcy: unknown key: did you mean 'policy'",
        ),
        ("methods: {backward_gate: {k: 600}}", r"r.yaml: methods.backward_gate: k=600 exceeds m=512"),
        (
            "data: {stream: [{skill: a}, {skill: b}, {skill: a, limit: 3}]}",
            r"data.stream.2: skill 'a' returns with other data \(limit: None, now 3\)",
        ),
        ("methods: {schema_bnk: {}}", r"unknown method 'schema_bnk': did you mean 'schema_bank'"),
        ("report_to: [wandbb]", r"'wandbb' is no tracker"),
        ("seed: 1\nseed: 2", r"line 2: key 'seed' is written twice"),
        ("a: [", r"not valid YAML"),
        ("- 1", r"not a mapping"),
    ],
)
def test_bad_recipes_name_the_path_and_the_cure(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path / "r.yaml", content))


def test_missing_recipe_suggests_a_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "lora.yaml", "name: x")
    with pytest.raises(ConfigError, match=r"did you mean .*lora.yaml"):
        load_recipe(tmp_path / "lra.yaml")


def test_inheritance_overrides_and_exclusive_keys(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: base\ntraining: {epochs: 2, learning_rate: 1e-3}\nlora: {r: 4}")
    child = write(tmp_path / "child.yaml", "base: base.yaml\nname: child\ntraining: {max_steps: 7}")
    recipe = load_recipe(child, ["lora.alpha=32", "training.learning_rate=2e-4", "data.stream=null"])
    assert recipe.name == "child" and recipe.training.max_steps == 7 and recipe.training.epochs is None
    assert recipe.lora is not None and (recipe.lora.r, recipe.lora.alpha) == (4, 32)
    assert recipe.training.learning_rate == 2e-4
    assert load_recipe(child, ["training.epochs=3"]).training.max_steps is None


def test_inheritance_loops_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml")
    with pytest.raises(ConfigError, match="inherits from itself"):
        load_recipe(write(tmp_path / "b.yaml", "base: a.yaml"))


def test_seed_names_are_aliases(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.yaml",
        "base_model: random:llama\nlora: {lora_alpha: 7}\ntraining: {total_steps: 3, batch_size: 2}",
    )
    recipe = load_recipe(path)
    assert recipe.model.name_or_path == "random:llama"
    assert recipe.lora is not None and recipe.lora.alpha == 7
    assert recipe.training.max_steps == 3 and recipe.training.per_device_train_batch_size == 2
    assert "lora.lora_alpha -> lora.alpha" in read_content(path)["_aliases"]


def test_the_methods_block_names_exactly_the_methods_that_run() -> None:
    base = {"methods": {"a": {"x": 1, "y": 2}, "b": {}}}
    assert merge(base, {"methods": {}})["methods"] == {}
    assert merge(base, {"methods": {"a": {"x": 5}}})["methods"] == {"a": {"x": 5, "y": 2}}


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = recipe_from({"training": {"max_steps": 3}, "lora": None, "seed": 9})
    again = recipe_from(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe and again.run_id() == recipe.run_id()


def test_run_id_depends_on_the_work_only() -> None:
    base = recipe_from({})
    for same in (
        {"output_dir": "x"},
        {"name": "y"},
        {"report_to": []},
        {"logging_every": 3},
        {"model": {"device": "cpu"}},
    ):
        assert recipe_from(same).run_id() == base.run_id(), same
    for other in (
        {"seed": 1},
        {"training": {"max_steps": 3}},
        {"lora": {"r": 4}},
        {"data": {"packing": True}},
    ):
        assert recipe_from(other).run_id() != base.run_id(), other


values = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=2), values, max_size=4),
    st.dictionaries(st.text(max_size=2), values, max_size=4),
)
def test_merge_laws(a: dict, b: dict) -> None:
    assert merge(a, {}) == a
    assert merge({}, b) == b
    assert merge(merge(a, b), b) == merge(a, b)


@pytest.mark.parametrize(
    ("written", "steps"), [("1", 1), ("1.0", 120), ("0.5", 60), ("60", 60), ("60.0", 60), ("0.001", 1)]
)
def test_a_float_up_to_one_is_a_share_and_an_integer_is_steps(
    tmp_path: Path, written: str, steps: int
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"training: {{eval_every: {written}}}")
    first = load_recipe(file)
    again = recipe_from(parse_yaml(dump_recipe(first), "again"))
    for recipe in (first, again):
        assert recipe.training.interval(recipe.training.eval_every, 120) == steps
    file.write_text("training: {eval_every: 2.5}")
    with pytest.raises(ConfigError, match="neither a share"):
        load_recipe(file)


def test_a_setting_that_waits_for_replayed_rows_is_refused_without_replay() -> None:
    from headgate.experiments.plan import plan

    experts = {"merge_above": 0.8, "merge_replay": 20}
    content = {"name": "x", "model": {"name_or_path": "embedded"}, "methods": {"lora_experts": experts}}
    with pytest.raises(ConfigError, match="merge_replay works on replayed rows"):
        plan(recipe_from(content))


@pytest.mark.parametrize(
    "changes",
    [
        ["training.max_steps=4"],
        ["training.max_steps=4", "training.epochs=null"],
        ["training.epochs=null", "training.max_steps=4"],
    ],
)
def test_a_length_that_is_set_to_null_takes_nothing_out(changes: list[str]) -> None:
    """``max_steps=4`` and then ``epochs=null`` once trained the default of 200 steps."""
    recipe = recipe_of_content({"training": {"epochs": 3}}, changes, "here")
    assert (recipe.training.max_steps, recipe.training.epochs) == (4, None)
    merged = merge({"training": {"max_steps": 4}}, {"training": {"epochs": None}})
    assert merged["training"] == {"max_steps": 4, "epochs": None}
