"""What cannot work is told by ``validate`` and before any run: with its place, its value and the cure."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from transformers.trainer_utils import SchedulerType

from headgate.errors import HeadgateError
from headgate.experiments import preflight
from headgate.experiments.arms import arm_recipes, check_comparison
from headgate.experiments.metric import chosen_metric
from headgate.experiments.preflight import NEEDS, check_recipe
from headgate.experiments.recipe_file import load_recipe, recipe_from
from headgate.methods.stage import Schedule
from tests.cli.test_cli import here

SRC = Path(__file__).parents[2] / "src" / "headgate"
ROOM = {"data": {"validation": None}}
TASK = {"task": "perplexity", "source": "wordmath", "limit": 8}
ARMS = {"seeds": [1, 2, 3], "arms": {"lora": {}, "gate": {"methods": {"backward_gate": {}}}}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"training": {"early_stopping": {}}, **ROOM}, "data.validation is null"),
        ({"training": {"early_stopping": {"metric": "eval_los"}}}, "early_stopping.metric=eval_los: .* did you mean 'eval_loss'"),
        ({"evaluation": [{**TASK, "routing": "on"}]}, "evaluation.0.routing=on: this recipe has no method"),
        ({"data": {"chat_template": "{{ broken"}}, "data.chat_template, line 1"),
        ({"model": {"adapter": "./gone"}}, "model.adapter='./gone': the folder does not exist"),
        ({"output_dir": "/dev/null/runs"}, "output_dir=/dev/null/runs: /dev/null is a file"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told(content: dict[str, Any], said: str) -> None:
    with pytest.raises(HeadgateError, match=said):
        check_recipe(recipe_from(content))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"report_to": ["wandb"]}, "report_to=wandb"),
        ({"report_to": ["trackio"]}, "report_to=trackio"),
        ({"report_to": ["tensorboard"]}, "report_to=tensorboard"),
        ({"model": {"attn_implementation": "flash_attention_2"}}, "model.attn_implementation=flash_attention_2"),
        ({"model": {"load_in_4bit": True}}, "model.load_in_4bit=true"),
        ({"evaluation": [{**TASK, "task": "hellaswag"}]}, "evaluation.0.task=hellaswag"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named_with_its_pip_line(
    content: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from(content)
    monkeypatch.setattr(preflight, "find_spec", lambda _name: None)
    with pytest.raises(HeadgateError, match=re.escape(place) + " needs .*: pip install"):
        check_recipe(recipe)


def test_every_extra_that_a_cure_names_exists() -> None:
    project = (SRC.parents[1] / "pyproject.toml").read_text()
    named = {extra for _, cure in NEEDS.values() for extra in re.findall(r"headgate\[([\w-]+)\]", cure)}
    assert named and all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in named)


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ({"metric": "perplexity_wordmth"}, "did you mean 'perplexity_wordmath'"),
        ({"metric": "evaluation.perplexity_wordmth.loss"}, "has no evaluation 'perplexity_wordmth'"),
        ({"metric": "evaluation.perplexity_wordmath.lss"}, "did you mean 'loss'"),
        ({"metric": "training.eval_los"}, "did you mean 'eval_loss'"),
        ({"metric": "training.acceptance_rate"}, "arm 'lora' will have no such figure"),
        ({"metric": "continual.average"}, "trains on no stream"),
        ({"metric": "training.eval_loss", "arms": {"base": {"training": {"max_steps": 0}}, "lora": {}}}, "arm 'base' trains nothing"),
        ({"baseline": "lra"}, "did you mean 'lora'"),
        ({"contrasts": [["lora", "gat"]]}, "no arm 'gat': did you mean 'gate'"),
        ({"tune": {"values": [1e-4], "metric": "eval_lss"}}, "compare.tune.metric=training.eval_lss"),
        ({"tune": {"values": [1e-4], "key": "training.learning_rte"}}, "did you mean 'learning_rate'"),
        ({"tune": {"values": [1e-4, -1]}}, "compare.tune: arm 'lora' with training.learning_rate=-1"),
        ({"tune": {"values": []}}, "compare.tune.values is empty"),
        ({"tune": {"values": [1e-4], "arms": ["gat"]}}, "compare.tune.arms: there is no arm 'gat'"),
    ],
)  # fmt: skip
def test_a_comparison_is_judged_before_its_first_run(compare: dict[str, Any], said: str) -> None:
    recipe = recipe_from({"evaluation": [TASK], "compare": {**ARMS, **compare}})
    with pytest.raises(HeadgateError, match=said):
        check_comparison(recipe, arm_recipes(recipe))


CUT_DOCUMENTS = "map_stories.yaml"
"""Written before perplexity refused documents cut by ``chunk_characters``: it no longer loads, and says why."""


def test_every_checked_in_comparison_passes() -> None:
    seen = 0
    for path in sorted((SRC / "recipes").rglob("*.yaml")):
        if (
            path.name.startswith("_")
            or path.name == CUT_DOCUMENTS
            or not (yaml.safe_load(path.read_text()) or {}).get("compare")
        ):
            continue
        recipe = load_recipe(path)
        check_comparison(recipe, arm_recipes(recipe))
        assert chosen_metric(recipe).path
        seen += 1
    assert seen >= 10


def test_schedules_are_transformers_own() -> None:
    assert set(get_args(Schedule)) < {kind.value for kind in SchedulerType}


def test_no_message_advises_a_flag_that_does_not_exist() -> None:
    """Every ``--flag`` in a string of the package is one that some file of the command line declares, or another program's."""
    declared = set(
        re.findall(r'"(--[a-z][a-z-]*)', "".join(p.read_text() for p in (SRC / "cli").glob("*.py")))
    )
    for path in (SRC / "cli").glob("*.py"):  # options named after their parameter
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                declared |= {"--" + a.arg.replace("_", "-") for a in node.args.args}
    theirs = {
        "--porcelain",
        "--help",
        "--multi",
        "--enable-lora",
        "--lora-modules",
        "--continuous-batching",
    }  # git, typer, accelerate, transformers
    for path in SRC.rglob("*.py"):
        if path.parts[-2] in ("benchmarks", "testing") or path.name.startswith("sandbox"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", node.value):
                    assert flag in declared | theirs, f"{path}:{node.lineno} advises {flag}"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"name: caf\xe9\n", "line 1: byte 0xe9 is not UTF-8"),
        (b"", "is empty"),
        (b"training: {learning_rate: .inf}", "training.learning_rate: should be a finite number (got inf)"),
        (b"seed: -1", "seed: should be greater than or equal to 0 (got -1)"),
        (b"data: {max_length: 999999999}", "data.max_length: should be less than or equal to"),
        (b"lora: {r: 100000}", "lora.r=100000 exceeds"),
        (b"training: {lr_scheduler: cosin}", "training.lr_scheduler: did you mean 'cosine'?"),
    ],
)
def test_validate_ends_in_one_line(tmp_path: Path, written: bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(written)
    done = here("validate", path)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_that_is_not_there_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "first").mkdir(parents=True)
    for target in ("runs/nope", "./nope", "mine/frst"):
        done = here("generate", target, "--prompt", "Two")
        assert done.returncode == 1 and f"{target} does not exist" in done.stderr, done.stderr
    assert "did you mean mine/first" in done.stderr
