"""``headgate demo``: its four parts are sound, a small one of them runs to its page, a wrong word ends before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from headgate.errors import ConfigError
from headgate.experiments.arms import arm_recipes
from headgate.experiments.demo import PARTS, execute, parts
from headgate.experiments.recipe_file import load_recipe
from headgate.experiments.shipped import find_shipped, opening

from .test_cli import here


@pytest.mark.parametrize("name", PARTS)
def test_each_part_sets_its_method_against_a_baseline_without_it_or_without_its_routing(name: str) -> None:
    recipe = load_recipe(find_shipped(f"demo/{name}"))
    arms = arm_recipes(recipe)
    assert recipe.compare is not None and len(recipe.compare.seeds) == 3
    assert PARTS[name] in arms and PARTS[name] in arms[PARTS[name]].methods
    baseline = arms[str(recipe.compare.baseline)]
    plain = baseline.methods.get(PARTS[name], {}).get("policy") == "static" or not baseline.methods
    assert plain and opening(find_shipped(f"demo/{name}"))


def test_a_wrong_word_ends_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the demo has experts, routing, gate, bank"):
        parts(tmp_path, ["bnak"])
    with pytest.raises(ConfigError, match="at least one"):
        execute([], tmp_path, 0)
    refused = here("demo", "-o", tmp_path / "demo", "--workers", "0")  # 0 is no default
    assert refused.returncode == 2 and "at least one" in refused.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_part_runs_to_its_page_and_picture(tmp_path: Path) -> None:
    small = ["training.max_steps=8", "evaluation.0.limit=8", "data.validation.limit=8", "compare.seeds=[1]"]
    words = [word for change in small for word in ("--set", change)]
    done = here("demo", "-o", tmp_path / "demo", "--only", "bank", *words)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "demo" / "index.html").read_text()
    assert "Do schemas help where rows are few?" in page and "schema_bank" in page
    assert (tmp_path / "demo" / "overview.png").read_bytes().startswith(b"\x89PNG")
    own = tmp_path / "demo" / page.split('<a href="')[1].split('"')[0]
    assert own.exists() and own.name == "index.html"
