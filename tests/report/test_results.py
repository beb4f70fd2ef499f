"""``hg.train``, ``hg.compare`` and what they return: the same figures as the folders, as frames and plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import headgate as hg
from headgate.errors import CheckpointError, ConfigError
from headgate.experiments.compare import Comparison

from .conftest import ITEMS, SKILL, STEPS, make_comparison, recipe

SEEDS = [1, 2, 3]


def test_a_comparison_is_what_its_json_says(compared: Path) -> None:
    found = hg.open_results(compared)
    assert isinstance(found, hg.ComparisonResult)
    written = json.loads((compared / "comparison.json").read_text())
    frame = found.frame()
    assert list(frame.index) == list(SKILL) and list(frame.columns)[:3] == ["mean", "sd", "difference"]
    for name, arm in written["arms"].items():
        assert frame.loc[name, "mean"] == arm["mean"]
        if name in written["contrasts"]:
            t = written["contrasts"][name]["t"]
            assert list(frame.loc[name, ["difference", "low", "high"]]) == [t["mean"], t["low"], t["high"]]
            assert frame.loc[name, "verdict"] == written["contrasts"][name]["verdict"]
    runs = found.runs()
    assert len(runs) == len(SKILL) * len(SEEDS) and (runs["status"] == "complete").all()
    assert runs.loc[("schema_bank", 2), "evaluation.exact_match_wordmath.items"] == ITEMS
    assert runs.loc["schema_bank", "metric"].mean() == pytest.approx(written["arms"]["schema_bank"]["mean"])
    assert found.verdict in repr(found) and found.verdict.replace("'", "&#x27;") in found._repr_html_()
    assert len(found.plot().axes[0].lines) > len(SKILL)


def test_a_run_is_what_its_log_says(compared: Path) -> None:
    run = hg.open_results(
        next(p.parent for p in sorted(compared.parent.glob("*/metrics.jsonl")) if p.stat().st_size)
    )
    assert isinstance(run, hg.RunResult)
    frame = run.frame()
    assert list(dict.fromkeys(frame.index)) == list(STEPS) and frame["eval_loss"].notna().sum() == len(STEPS)
    assert run.plot().axes and run.result["training"]["steps"] == STEPS[-1]
    assert run.folder.name in repr(run)


def test_what_is_not_finished_says_so(tmp_path: Path) -> None:
    begun = Comparison(recipe(tmp_path, SEEDS))
    begun._note({name: {} for name in begun.arms})
    found = hg.open_results(begun.folder)
    with pytest.raises(CheckpointError, match="not finished"):
        found.frame()
    with pytest.raises(ConfigError, match="nothing to draw"):
        found.plot()
    make_comparison(tmp_path, SEEDS)
    with pytest.raises(CheckpointError, match="no comparison"):
        hg.open_results(begun.folder.parent)


def test_a_wrong_call_is_one_line_before_any_work() -> None:
    with pytest.raises(ConfigError, match="one of them"):
        hg.train()
    with pytest.raises(ConfigError, match="one of them"):
        hg.compare("demo/bank", data="my.jsonl")
    with pytest.raises(ConfigError, match="go with data="):
        hg.compare("demo/bank", methods=["layer_routing"])
    with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
        hg.train({"name": "x", "training": {"max_stepz": 2}})
    with pytest.raises(ConfigError, match="compare: section"):
        hg.compare({"name": "x", "training": {"max_steps": 2}})


def test_a_mapping_is_trained_once(tmp_path: Path) -> None:
    content = {
        "name": "tiny",
        "output_dir": str(tmp_path),
        "model": {"name_or_path": "random:llama"},
        "data": {"train": {"source": "wordmath", "limit": 16}, "max_length": 256},
        "training": {"max_steps": 50, "per_device_train_batch_size": 2},
        "logging_every": 1,
    }
    said: list[str] = []
    run = hg.train(content, overrides=["training.max_steps=2"], say=said.append)
    assert content["training"] == {"max_steps": 50, "per_device_train_batch_size": 2}, (
        "what is given stays as it is"
    )
    assert run.result["training"]["steps"] == 2 and len(run.frame()["loss"].dropna()) == 2 and said
    again = hg.train(content, overrides=["training.max_steps=2"], say=said.append)
    assert again.folder == run.folder and "nothing to do" in said[-1]
    model, _ = hg.load(run.checkpoint, device="cpu")
    assert any("lora" in name for name, _ in model.named_parameters())
