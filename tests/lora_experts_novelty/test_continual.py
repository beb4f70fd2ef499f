"""Continual metrics against matrices worked out by hand; replay and joint order; streams of skills."""

from __future__ import annotations

from typing import Any

import pytest

from headgate.config import build_config
from headgate.data.config import DataConfig, SkillConfig
from headgate.data.streams import load_stream
from headgate.errors import ConfigError
from headgate.evaluation.continual import continual_metrics, continual_result
from headgate.experiments.continual import as_one_stage, segment_ends
from headgate.experiments.metric import Metric
from headgate.experiments.recipe_file import recipe_from
from headgate.methods.stage import Stage, schedule_stages
from headgate.training.order import Replay, StreamOrder


# -- metrics --------------------------------------------------------------------------------------------------
def test_metrics_of_three_skills_by_hand() -> None:
    before = [3.0, 3.0, 3.0]
    losses = [[1.0, 2.5, 2.9], [1.4, 1.0, 2.0], [1.2, 1.6, 0.9]]
    found = continual_metrics(before, losses, ["a", "b", "c"], ["a", "b", "c"])
    assert found == pytest.approx(
        {
            "average": (1.2 + 1.6 + 0.9) / 3,
            "backward_transfer": ((1.0 - 1.2) + (1.0 - 1.6)) / 2,
            "forgetting": ((1.2 - 1.0) + (1.6 - 1.0)) / 2,
            "forward_transfer": ((3.0 - 2.5) + (3.0 - 2.0)) / 2,
            "trace_backward_transfer": ((1.0 - 1.2) + (1.0 - 1.6) + 0) / 3,
        }
    )


def test_accuracies_are_negated_losses() -> None:
    before, matrix = [0.1, 0.2], [[0.9, 0.3], [0.6, 0.8]]
    accuracy = continual_metrics(before, matrix, ["a", "b"], ["a", "b"], higher=True)
    loss = continual_metrics([-x for x in before], [[-x for x in r] for r in matrix], ["a", "b"], ["a", "b"])
    assert accuracy["average"] == pytest.approx(0.7) and loss["average"] == pytest.approx(-0.7)
    for name in ("backward_transfer", "forgetting", "forward_transfer"):
        assert accuracy[name] == pytest.approx(loss[name])
    assert accuracy["backward_transfer"] == pytest.approx(-0.3) and accuracy["forgetting"] == pytest.approx(
        0.3
    )


def test_a_recurring_skill_counts_from_its_last_training() -> None:
    losses = [[1.0, 3.0], [2.0, 1.0], [0.5, 1.5], [0.7, 1.2]]
    found = continual_metrics([3.0, 3.0], losses, ["a", "b"], ["a", "b", "a", "b"])
    assert found["backward_transfer"] == pytest.approx(
        0.5 - 0.7
    )  # b was trained last: it cannot be forgotten
    assert found["forgetting"] == pytest.approx(0.7 - 0.5)
    assert found["forward_transfer"] == pytest.approx(3.0 - 3.0)


def test_one_segment_has_an_average_only() -> None:
    found = continual_metrics([2.0], [[1.0]], ["a"], ["a"])
    nothing = ("backward_transfer", "forgetting", "forward_transfer", "trace_backward_transfer")
    assert found == {"average": 1.0, **dict.fromkeys(nothing)}


@pytest.mark.parametrize(
    ("matrix", "segments", "message"),
    [([[1.0]], ["a", "a"], "2 segments x 1 skills"), ([[1.0]], ["z"], "'z' trains a skill that is not")],
)
def test_matrices_that_do_not_fit(matrix: Any, segments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        continual_metrics([2.0], matrix, ["a"], segments)


def test_what_is_watched_says_how_general_ability_changed() -> None:
    """TRACE's delta: from before the stream to its end, over data that no segment trains; it enters no other figure."""
    rows = history("ab", [0, 5, 8])
    for step, loss in ((0, 2.0), (5, 1.0), (8, 2.5)):
        rows.append({"step": step, "eval_mbpp_loss": loss, "eval_mbpp_accuracy": 1 - loss / 10})
    segments = [("a", 5), ("b", 8)]
    plain, watched = (continual_result(rows, ["a", "b"], segments, watched=w) for w in ((), ("mbpp",)))
    assert plain["general_change"] is None
    assert watched["general_change"] == pytest.approx(2.0 - 2.5)
    assert watched["accuracy"]["general_change"] == pytest.approx(-0.05)
    assert watched["better"]["general_change"] == "higher"
    assert {**watched, "general_change": None, "accuracy": None} == {**plain, "accuracy": None}


def history(skills: str, steps: list[int]) -> list[dict[str, float]]:
    """One row per data set and step, as the trainer logs them; every value names its place."""
    return [
        {"step": step, f"eval_{skill}_loss": step + i, f"eval_{skill}_accuracy": -step - i}
        for step in steps
        for i, skill in enumerate(skills)
    ]


def test_result_from_a_log() -> None:
    rows = history("ab", [0, 3, 5, 8])
    found = continual_result(rows, ["a", "b"], [("a", 5), ("b", 8)])
    assert found["before"] == [0, 1] and found["matrix"] == [[5, 6], [8, 9]] and found["steps"] == [5, 8]
    assert found["average"] == 8.5 and found["backward_transfer"] == 5 - 8
    assert found["accuracy"]["average"] == -8.5 and found["accuracy"]["backward_transfer"] == 5 - 8
    assert found["better"]["average"] == "lower" and found["accuracy"]["better"]["average"] == "higher"
    joint = continual_result(rows, ["a", "b"], [("a", 5), ("b", 8)], joint=True)
    assert joint["average"] == 8.5 and joint["backward_transfer"] is joint["forgetting"] is None
    with pytest.raises(ConfigError, match="'b' was not evaluated at step 8"):
        continual_result(rows[:-1], ["a", "b"], [("a", 5), ("b", 8)])


@pytest.mark.parametrize(
    ("path", "higher"),
    [
        ("continual.average", False),
        ("continual.accuracy.average", True),
        ("continual.backward_transfer", True),
        ("continual.forgetting", False),
        ("continual.accuracy.forgetting", False),
        ("continual.forward_transfer", True),
    ],
)
def test_directions(path: str, higher: bool) -> None:
    assert Metric(tuple(path.split("."))).higher_is_better is higher


# -- order ----------------------------------------------------------------------------------------------------
VIEWS = {"a": range(0, 40), "b": range(40, 90), "c": range(90, 110), "a#2": range(110, 150)}


def stages(steps: int = 30) -> list[Stage]:
    return [
        Stage(
            name=n,
            steps=steps,
            train={"lora": 1e-3},
            data=n,
            options={"skill": n.split("#")[0], "labelled": True},
        )
        for n in VIEWS
    ]


def order(replay: Replay | None, seed: int = 0, steps: int = 30) -> list[int]:
    made = stages(steps)
    return list(StreamOrder(schedule_stages(made, 4 * steps), VIEWS, 8, seed, replay))


def home(row: int) -> str:
    return next(name for name, view in VIEWS.items() if row in view)


def test_replay_keeps_the_length_and_shows_earlier_skills_only() -> None:
    rows = order(Replay(0.2, 10))
    assert len(rows) == len(order(None)) == 4 * 30 * 8
    parts = [{home(r) for r in rows[i : i + 240]} for i in range(0, 960, 240)]
    assert parts[:3] == [{"a"}, {"a", "b"}, {"a", "b", "c"}]
    assert parts[3] == {"a#2", "b", "c"}  # a skill that is back is not replayed beside itself


def test_replay_takes_its_share_from_a_fixed_subset() -> None:
    rows = order(Replay(0.1, 10), steps=400)
    for segment, name in enumerate(("b", "c"), start=1):
        mixed = [r for r in rows[3200 * segment : 3200 * (segment + 1)] if home(r) != name]
        assert len(mixed) / 3200 == pytest.approx(0.1, abs=0.025)
    kept = {r for r in rows[3200:9600] if home(r) == "a"}
    assert len(kept) == 10


def test_replay_is_a_pure_function_of_seed_and_step() -> None:
    """Which slots are replayed at a step, and by what, does not depend on the steps before it: a resume repeats it."""
    scheduled = schedule_stages(stages(), 120)
    whole = StreamOrder(scheduled, VIEWS, 8, 3, Replay(0.3, 10))
    again = StreamOrder(scheduled, VIEWS, 8, 3, Replay(0.3, 10))
    assert list(whole) == list(again) == order(Replay(0.3, 10), seed=3) != order(Replay(0.3, 10), seed=4)
    earlier = whole._earlier(scheduled[2])
    rows = list(whole)
    for step in (60, 75, 89):
        for slot, row in again._replayed(step, earlier).items():
            assert rows[step * 8 + slot] == row


def test_rows_that_are_not_replayed_keep_their_order() -> None:
    plain, mixed = order(None), order(Replay(0.2, 10))
    own = [r for r in mixed[240:480] if home(r) == "b"]
    assert own == plain[240 : 240 + len(own)]


def test_joint_shows_the_rows_of_the_sequential_run() -> None:
    recipe = recipe_from(
        {
            "name": "j",
            "data": {"stream": [{"skill": s, "steps": 30} for s in "ab"], "stream_order": "joint"},
            "training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        }
    )
    train = {name: [{"row": r} for r in view] for name, view in VIEWS.items()}
    data, (one,) = as_one_stage(recipe, train, stages())
    shown = [data["joint"][i]["row"] for i in range(len(data["joint"]))]
    assert sorted(shown) == sorted(order(None, recipe.seed))
    assert one.steps == 120 and one.data == "joint" and one.options["labelled"] is False
    assert segment_ends(stages()) == [("a", 30), ("b", 60), ("c", 90), ("a", 120)]


# -- streams --------------------------------------------------------------------------------------------------
def skill(name: str, **changes: Any) -> SkillConfig:
    return SkillConfig(skill=name, limit=40, steps=2, options={"families": ["farm"]}, **changes)


def test_a_skill_may_return_with_the_same_rows_only() -> None:
    segments = load_stream([skill("x"), skill("y"), skill("x", labelled=False)])
    assert [s.name for s in segments] == ["x", "y", "x#2"]
    assert segments[2].train is segments[0].train and segments[2].labelled is False
    with pytest.raises(
        ConfigError, match=r"data\.stream\.2: skill 'x' returns with other data \(seed: 0, now 5\)"
    ):
        load_stream([skill("x"), skill("y"), skill("x", seed=5)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": {"ratio": 0.1}}, "list them under stream"),
        ({"stream_order": "joint"}, "list them under stream"),
        ({"stream": [{"skill": "a"}], "stream_order": "joint", "replay": {}}, "nothing to replay"),
        ({"stream": [{"skill": "a"}], "replay": {"ratio": 1.0}}, "replay.ratio"),
        ({"stream": [{"skill": "a"}], "watch": {"a": {}}}, "has a skill of that name"),
    ],
)
def test_wrong_stream_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(DataConfig, options)


def test_more_skills_than_steps() -> None:
    bare = [SkillConfig(skill=s, limit=400) for s in "abc"]
    with pytest.raises(ConfigError, match=r"3 skills cannot share training\.max_steps=2"):
        load_stream(bare, 2)
