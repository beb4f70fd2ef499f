"""Equal time is checked against FLOPs; an equal dose is the count of another arm; a default that changed is seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headgate.errors import CheckpointError, ConfigError
from headgate.experiments.compare import Comparison
from headgate.experiments.equal_dose import check_replay, replaying
from headgate.experiments.equal_time import measured_steps
from headgate.experiments.inputs import require_same_defaults
from headgate.experiments.recipe_file import recipe_from
from headgate.files import read_json
from tests.experiments.test_compare import recipe as comparison

SEEDS = [1, 2, 3, 4]


def calibrated(
    seconds: dict[str, list[float]], flops: dict[str, float]
) -> tuple[dict[str, Any], list[str], int]:
    asked: dict[str, int] = {"plain": 0, "gated": 0}
    said: list[str] = []

    def trained(arm: str, seed: int) -> dict[str, Any]:
        asked[arm] += 1
        return {"steps": 160, "seconds": seconds[arm][asked[arm] - 1], "flops": flops[arm]}

    return measured_steps(trained, "plain", "gated", SEEDS, said.append), said, asked["plain"]


def test_where_time_and_flops_agree_two_runs_are_enough() -> None:
    found, said, runs = calibrated({"plain": [10, 11], "gated": [6.5, 7]}, {"plain": 100, "gated": 66})
    assert (found["steps"], found["steps_by_flops"], runs, said) == (104, 106, 2, [])


def test_a_pause_of_the_machine_is_measured_away() -> None:
    """The plain arm was slowed down in its first runs: 85 steps where FLOPs say 106."""
    found, said, runs = calibrated(
        {"plain": [13, 12.5, 10, 10], "gated": [6.6, 6.8, 6.7, 6.6]}, {"plain": 100, "gated": 66}
    )
    assert runs == 4 and found["steps"] == 106 and found["gap"] < 0.01 and said == []


def test_a_gap_that_remains_is_said() -> None:
    found, said, runs = calibrated({"plain": [10] * 4, "gated": [5] * 4}, {"plain": 100, "gated": 66})
    assert runs == 4 and found["steps"] == 80 and found["gap"] == pytest.approx(0.32)
    assert "80 steps fit in the time of gated, and 106 in its FLOPs" in said[0]


RANDOM = {"methods": {"backward_gate": {"score": "random"}}}
GATED = {"methods": {"backward_gate": {}}}


def test_a_replay_accepts_exactly_the_other_arms_count() -> None:
    arm = replaying(recipe_from(RANDOM), {"accepted": 31, "offered": 160})
    assert list(arm.methods["backward_gate"]["replay"]) == [31, 160]


def test_a_comparison_replays_the_count_of_each_seed(tmp_path: Path) -> None:
    """The replaying arm is listed first and still runs after the arm whose count it takes."""
    gate = {"m": 32, "k": 4, "burn_in": 1, "window": 8, "target_acceptance": 0.4}
    arms = {
        "random": {"replay_of": "gate", "methods": {"backward_gate": {**gate, "score": "random"}}},
        "gate": {"methods": {"backward_gate": {**gate, "score": "energy", "rule": "quantile"}}},
    }
    compare = {"seeds": [1, 2], "arms": arms, "baseline": "gate"}
    training = {
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "save_every": 10,
        "eval_every": 10,
        "loss": "chunked",
    }
    report = Comparison(comparison(tmp_path, compare, training=training)).execute()
    for seed in ("1", "2"):
        counts = [
            read_json(Path(report["arms"][name]["runs"][seed]) / "result.json")["training"]["accepted"]
            for name in ("random", "gate")
        ]
        assert counts[0] == counts[1] and 1 < counts[1] < 10


@pytest.mark.parametrize(
    ("arm", "other", "message"),
    [
        (RANDOM, "absent", "there is no arm 'absent'"),
        (RANDOM, "lora", "has no backward_gate of its own"),
        (RANDOM, "again", "has no backward_gate of its own"),
        (GATED, "gate", "give the arm methods.backward_gate.score: random"),
    ],
)
def test_what_cannot_be_replayed_is_refused(arm, other, message) -> None:
    arms = {"lora": recipe_from({}), "gate": recipe_from(GATED), "again": recipe_from(RANDOM)}
    with pytest.raises(ConfigError, match=message):
        check_replay("random", recipe_from(arm), other, arms, {"again": "gate"})


def test_a_complete_run_under_another_default_is_not_taken_for_this_one(tmp_path: Path) -> None:
    recipe = recipe_from(GATED)
    same = {"methods": {"backward_gate": {"beta": recipe.methods["backward_gate"]["beta"], "gone": 1}}}
    directory = SimpleNamespace(path=tmp_path, recipe_content=lambda: same)
    require_same_defaults(directory, recipe)
    directory.recipe_content = lambda: {"methods": {"backward_gate": {"beta": 10.0}}}
    with pytest.raises(CheckpointError, match=r"ran with methods.backward_gate.beta=10.0.*it is 40.0 now"):
        require_same_defaults(directory, recipe)
