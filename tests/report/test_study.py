"""What a folder holds: comparisons (whole, moved, unfinished), runs, sweeps; and what the page says of it in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from headgate.errors import CheckpointError
from headgate.experiments.report import words
from headgate.experiments.report.page import build, write_report
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.style import house_style, svg_of
from headgate.experiments.report.tables import arms_table
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.sweep_table import sweep_table, write_table

from .conftest import SKILL, make_comparison, recipe, write_run


def test_a_comparison_is_read_with_its_own_statistics(compared: Path) -> None:
    study = read_study(compared)
    assert [arm.name for arm in study.arms] == list(SKILL) and study.baseline == "lora"
    summary = json.loads((compared / "comparison.json").read_text())
    for arm in study.arms:
        assert study.metric is not None
        assert list(arm.values(study.metric).values()) == summary["arms"][arm.name]["values"]
    assert len(study.arm("base").distinct) == 1, "an arm without training ran once"


def test_verdicts_are_those_of_the_comparison(compared: Path) -> None:
    study = read_study(compared)
    kinds = {found.arm: found.kind for found in words.verdicts(study)}
    assert kinds["base"] == "hurts" and kinds["schema_bank"] == "helps" and kinds["backward_gate"] == "none"
    assert words.headline(study).startswith("Against lora: schema_bank helps; layer_routing hurts")
    untrained = next(found for found in words.verdicts(study) if found.arm == "base")
    assert untrained.words.startswith("worse by"), "a model left as it was neither helps nor hurts"
    for found in words.verdicts(study):
        if found.arm == untrained.arm:
            continue
        assert study.contrasts[found.arm]["verdict"].split()[0] == found.words.split()[0]


def test_a_moved_folder_is_read_where_it_is(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared.parent, tmp_path / "moved")
    study = read_study(tmp_path / "moved" / compared.name)
    assert not study.missing
    assert all(tmp_path in run.directory.path.parents for run in study.runs)


def test_an_unfinished_comparison_says_what_is_missing(tmp_path: Path) -> None:
    study = read_study(make_comparison(tmp_path, [1, 2, 3], finish=False))
    assert words.headline(study).startswith("Unfinished: 5 complete runs")
    trained = [
        name for name in SKILL if name != "base"
    ]  # the untouched model is one run at every seed, and it is there
    assert set(study.missing) == {f"{name}, seed {seed}" for name in trained for seed in (2, 3)}
    assert any(told.startswith("Missing: ") for told in words.warnings(study))
    assert words.verdicts(study) == [], "no verdict before the last run"
    assert words.seeds_phrase(study) == "1 of 3 seeds (1, 2, 3) complete in every arm so far"
    assert {row[arms_table(study).columns.index("verdict")] for row in arms_table(study).rows} == {
        "baseline",
        "not yet",
    }


def test_a_table_alone_has_its_verdicts_and_says_what_it_lacks(compared: Path, tmp_path: Path) -> None:
    """A ``comparison.json`` that was sent or kept: the same figures and verdicts, nothing invented, no run called missing."""
    summary = json.loads((compared / "comparison.json").read_text())
    for arm in summary["arms"].values():
        arm["runs"] = {seed: f"/gone/{Path(path).name}" for seed, path in arm["runs"].items()}
    file = tmp_path / "kept.comparison.json"
    file.write_text(json.dumps(summary))
    whole, alone = read_study(compared), read_study(file)
    assert words.headline(alone) == words.headline(whole)
    assert [found.words for found in words.verdicts(alone)] == [
        found.words for found in words.verdicts(whole)
    ]
    for arm in whole.arms:
        assert alone.arm(arm.name).values(alone.metric) == arm.values(whole.metric)
    assert not alone.missing
    assert any("Drawn from the comparison's table" in told for told in words.warnings(alone))
    written = write_report(file)
    assert written.page == tmp_path / "kept.comparison" / "report" / "index.html"
    text = written.markdown.read_text()
    assert (
        "Recipes and environment" not in text and "## Learning" not in text and "no arm has run" not in text
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"arms": {}}'])
def test_a_file_that_is_no_comparison_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "something.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"is no comparison\.json"):
        read_study(file)


def test_an_empty_comparison_says_so(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, [1, 2, 3], finish=False)
    for run in [path for path in folder.parent.iterdir() if path != folder]:
        shutil.rmtree(run)
    assert words.headline(read_study(folder)) == "This comparison is empty: no arm has run yet"


def test_two_seeds_carry_no_interval_and_no_verdict(tmp_path: Path) -> None:
    study = read_study(make_comparison(tmp_path, [1, 2]))
    assert all(found.kind == "open" and found.interval is None for found in words.verdicts(study))
    assert words.headline(study) == "No verdict: 2 seeds carry no interval"
    assert any("no interval and no verdict" in told for told in words.warnings(study))


def test_mixed_versions_and_hardware_are_warned_of(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, [1, 2, 3])
    assert not words.warnings(read_study(folder))
    file = next(p for p in folder.parent.glob("*/env.json"))
    env = json.loads(file.read_text())
    env["versions"]["headgate"], env["hardware"]["cores"] = "0.0.1", 999
    file.write_text(json.dumps(env))
    told = " ".join(words.warnings(read_study(folder)))
    assert "Mixed Headgate versions: 0.0.1 and" in told and "Mixed hardware" in told


def test_a_missing_metric_is_said_and_never_drawn(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, [1, 2, 3])
    study = read_study(folder)
    run = study.arm("schema_bank").runs[2]
    result = json.loads(run.directory.result_file.read_text())
    del result["evaluation"]["exact_match_wordmath"]["accuracy"]
    run.directory.manifest_file.unlink()  # an edited result is refused; a run of an earlier version had no manifest
    run.directory.result_file.write_text(json.dumps(result))
    again = read_study(folder)
    assert "schema_bank has no accuracy of exact_match_wordmath at seed 2." in words.warnings(again)
    assert again.metric is not None and set(again.arm("schema_bank").values(again.metric)) == {1, 3}


def test_runs_of_a_folder_are_grouped_by_what_varies(tmp_path: Path) -> None:
    made = recipe(tmp_path, [1])
    plain = made.model_copy(update={"compare": None})
    for rate in (1e-3, 1e-2):
        for seed in (1, 2):
            training = plain.training.model_copy(update={"learning_rate": rate})
            write_run(plain.model_copy(update={"training": training, "seed": seed}), 0.5)
    study = read_study(tmp_path)
    assert study.varied == ["training.learning_rate"]
    assert {arm.name: sorted(arm.runs) for arm in study.arms} == {
        "learning_rate=0.001": [1, 2],
        "learning_rate=0.01": [1, 2],
    }
    assert len(arms_table(study).rows) == 2 and "verdict" not in arms_table(study).columns


def test_one_run_is_a_study_of_one_arm(compared: Path) -> None:
    run = read_study(compared).arm("layer_routing").runs[1].directory.path
    study = read_study(run)
    assert study.kind == "run" and study.methods == ["layer_routing"] and study.contrasts == {}


def test_a_run_that_is_being_written_is_read_up_to_its_last_whole_line(compared: Path) -> None:
    run = read_study(compared).arm("lora").runs[1]
    whole = run.directory.metrics()
    with run.directory.metrics_file.open("a") as file:
        file.write('{"step": 99, "lo')
    assert run.directory.metrics() == whole


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_nothing_to_report_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"is no folder|nothing to report"):
        read_study(tmp_path / name)


def test_a_sweep_is_read_from_its_table(tmp_path: Path) -> None:
    made = recipe(tmp_path, [1]).model_copy(update={"compare": None})
    done = []
    for rate in (1e-3, 1e-2):
        for seed in (1, 2):
            training = made.training.model_copy(update={"learning_rate": rate})
            overrides = {"training.learning_rate": rate, "seed": seed}
            run = write_run(made.model_copy(update={"training": training, "seed": seed}), 0.5 + 10 * rate)
            done.append((overrides, run, tmp_path / "no.log"))
    never = made.model_copy(update={"seed": 9})
    done.append(({"training.learning_rate": 1.0, "seed": 9}, RunDirectory.of(never), tmp_path / "no.log"))
    folder = tmp_path / "made" / "sweep-1"
    folder.mkdir()
    write_table(folder, sweep_table("rates", done))
    study = read_study(folder)
    assert [arm.name for arm in study.arms] == ["learning_rate=0.001", "learning_rate=0.01"]
    assert study.missing == ["learning_rate=1 seed=9"] and study.varied == ["training.learning_rate"]
    assert "with learning_rate=0.01. A search has no baseline" in words.headline(study)
    columns = arms_table(study).columns
    assert "CV" in columns and "verdict" not in columns
    with house_style():
        sections = {section.key: section for section in build(study)}
    (panel,) = sections["varied"].figures[0].panels
    assert panel.key == "varied_training_learning_rate"
    with house_style():
        svg = svg_of(panel.drawing, panel.key)
    assert ">0.001<" in svg and "$" not in svg, "ticks are numbers, not formulas"
