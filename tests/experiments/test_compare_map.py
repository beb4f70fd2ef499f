"""A map is the same comparison in every cell: what a cell finds is what it would have found alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.errors import ConfigError
from headgate.experiments.compare import Comparison
from headgate.experiments.compare_map import cells, map_folder
from headgate.experiments.recipe_file import dump_recipe
from headgate.experiments.report import words, write_report
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.sections.map import comparison_map
from tests.experiments.test_compare import recipe

ARMS = {"lora": {}, "faster": {"training": {"learning_rate": 1.0e-2}}}
COMPARE: dict[str, Any] = {"seeds": [1, 2, 3], "baseline": "lora", "metric": "perplexity_wordmath", "arms": ARMS}  # fmt: skip
GRID = {"grid": {"data.train.limit": [4, 40], "training.max_steps": [1, 2]}}


def test_a_cell_is_the_comparison_with_its_overrides(tmp_path: Path) -> None:
    found = list(cells(recipe(tmp_path, {**COMPARE, "map": GRID})))
    assert [cell.name for cell in found] == [
        "limit=4 max_steps=1",
        "limit=4 max_steps=2",
        "limit=40 max_steps=1",
        "limit=40 max_steps=2",
    ]
    alone = recipe(tmp_path, COMPARE, training={"max_steps": 2, "per_device_train_batch_size": 2, "save_every": 3, "eval_every": 3})  # fmt: skip
    last = found[-1]
    assert last.run_id() == alone.run_id()
    assert last.compare == alone.compare
    assert Comparison(last).folder.name == Comparison(alone).folder.name  # the same comparison has one digest
    assert Path(last.output_dir) == map_folder(recipe(tmp_path, COMPARE))


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"grid": {"training.max_stepz": [1]}}, "max_stepz.*max_steps"),
        ({"grid": {"training.max_steps": []}}, "compare.map.grid.training.max_steps is empty"),
        ({}, "give compare.map.grid"),
        ({"runs": [{"name": "a", "seed": 1}, {"name": "a", "seed": 2}]}, "two cells are called 'a'"),
        ({"runs": [{"model.name_or_path": "x/y"}]}, "add name"),
    ],
)
def test_a_wrong_map_is_refused_before_any_run(tmp_path: Path, grid: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(cells(recipe(tmp_path, {**COMPARE, "map": grid})))
    assert not list(tmp_path.iterdir())


def test_a_comparison_with_a_map_is_not_run_as_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cells"):
        Comparison(recipe(tmp_path, {**COMPARE, "map": GRID}))


def test_the_command_runs_every_cell_and_the_page_holds_their_figures(tmp_path: Path) -> None:
    one_axis = {"grid": {"training.max_steps": [2, 3]}}
    file = tmp_path / "map.yaml"
    file.write_text(dump_recipe(recipe(tmp_path / "runs", {**COMPARE, "map": one_axis})))
    for _ in range(2):  # the second time everything is complete
        shown = CliRunner().invoke(command_line("compare"), ["compare", str(file)])
        assert shown.exit_code == 0, shown.output
    folder = tmp_path / "runs" / "cmp"
    assert f"map: {folder}" in shown.output.replace("\n", "")
    page = (folder / "report" / "report.md").read_text()
    for steps in (2, 3):
        (file,) = (folder / f"max_steps={steps}").glob("comparison-*/comparison.json")
        t = json.loads(file.read_text())["contrasts"]["faster"]["t"]
        line = next(line for line in page.splitlines() if line.startswith(f"| max_steps={steps} | faster"))
        assert f"{t['low']:+.4f}".replace("-", "−") in line
    table = (folder / "report" / "map.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * len(ARMS)
    assert (folder / "report" / "figures" / "map.svg").exists()


def test_comparisons_of_other_baselines_are_no_map(tmp_path: Path) -> None:
    for name, baseline in (("a", "lora"), ("b", "faster")):
        made = recipe(tmp_path, {**COMPARE, "baseline": baseline}, name=name)
        Comparison(made).execute()
    assert not (write_report(tmp_path).page.parent / "map.csv").exists()


def written(
    folder: Path,
    name: str,
    metric: str,
    digest: str,
    mean: float,
    verdict: str = "hurts",
    higher: bool = False,
) -> None:
    place = folder / name / f"comparison-{digest}"
    place.mkdir(parents=True)
    arm = {"mean": 1.0, "cost": {"steps": 3}}
    contrast = {"differences": [mean] * 3, "t": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "p": 0.01}, "holm_p": 0.01}  # fmt: skip
    report = {
        "name": name, "metric": metric, "higher_is_better": higher, "baseline": "lora", "model": "m", "seeds": [1, 2, 3],
        "arms": {"lora": arm, "gate": arm}, "contrasts": {"gate": {**contrast, "verdict": f"{verdict} by {mean}"}},
    }  # fmt: skip
    (place / "comparison.json").write_text(json.dumps(report))


def test_a_comparison_judged_on_two_figures_has_a_cell_for_each_and_the_last_of_one_counts(
    tmp_path: Path,
) -> None:
    written(tmp_path, "stories", "evaluation.rare.loss", "old", 0.7)
    written(tmp_path, "stories", "evaluation.rare.loss", "new", 0.2)
    written(tmp_path, "stories", "evaluation.common.loss", "other", 0.3)
    written(tmp_path, "repeats", "evaluation.all.loss", "only", 0.4)
    os.utime(tmp_path / "stories" / "comparison-old" / "comparison.json", (1, 1))
    written(tmp_path, "torn", "evaluation.rare.loss", "half", 0.9)
    torn = tmp_path / "torn" / "comparison-half" / "comparison.json"
    torn.write_text(torn.read_text()[:40])  # as a crash leaves it: no cell, and no end of the others
    write_report(tmp_path)
    lines = (tmp_path / "report" / "map.csv").read_text().splitlines()[1:]
    found = {line.split(",")[0]: line.split(",")[3] for line in lines if ",gate," in line}
    assert found == {"repeats": "0.4", "stories: common": "0.3", "stories: rare": "0.2"}


@pytest.mark.parametrize(
    ("metric", "higher", "better"),
    [("evaluation.rare.loss", False, -0.5), ("evaluation.rare.accuracy", True, 0.5)],
)
def test_better_is_blue_told_apart_is_starred_and_the_headline_counts(
    tmp_path: Path, metric: str, higher: bool, better: float
) -> None:
    written(tmp_path, "pays", metric, "a", better, "helps", higher)
    written(tmp_path, "costs", metric, "b", -better, "hurts", higher)
    written(tmp_path, "neither", metric, "c", better / 10, "no detectable difference", higher)
    study = read_study(tmp_path)
    (figure, _) = comparison_map(study)
    (axes, _) = figure.panels[0].drawing.axes
    (mesh,) = axes.collections
    colours = dict(zip(study.cells, mesh.to_rgba(mesh.get_array()).reshape(3, 4), strict=True))
    assert colours["pays"][2] > colours["pays"][0] and colours["costs"][0] > colours["costs"][2]
    stars = dict(zip(study.cells, (text.get_text().endswith("*") for text in axes.texts), strict=True))
    assert stars == {"pays": True, "costs": True, "neither": False}
    assert words.headline(study).endswith("gate helps in 1 and hurts in 1 of 3")
