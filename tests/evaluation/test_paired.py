"""Two runs on the same items: matched by what was asked, refused when it was not the same."""

from __future__ import annotations

import math
import random

import pytest

from headgate.errors import DataError
from headgate.evaluation.paired import pair
from headgate.evaluation.predictions import prompt_hash
from headgate.experiments.paired import paired_lines, paired_report


def items(correct: list[bool], words: str = "x") -> list[dict]:
    return [
        {
            "id": str(i),
            "prompt_hash": prompt_hash(f"question {i}"),
            "prompt": f"question {i}",
            "gold": "1",
            "output": f"{words} {i}",
            "correct": c,
        }
        for i, c in enumerate(correct)
    ]


def test_pairs_do_not_depend_on_order() -> None:
    a, b = items([True, False, True]), items([True, True, False])
    random.Random(1).shuffle(b)
    assert [(p.a["id"], p.b["id"]) for p in pair(a, b)] == [(str(i), str(i)) for i in range(3)]


def test_other_items_are_refused() -> None:
    with pytest.raises(DataError, match="1 only in the first, 0 only in the second"):
        pair(items([True, True]), items([True]))


def test_mcnemar_interval_and_flips() -> None:
    a = items([False] * 10 + [True] * 30, "before")
    b = items([True] * 9 + [False] + [True] * 28 + [False] * 2, "after")
    report = paired_report(a, b)
    assert (report["gained"], report["lost"]) == (9, 2)
    exact = 2 * sum(math.comb(11, i) for i in range(3)) / 2**11
    assert math.isclose(report["p"], exact)
    assert report["difference"] == pytest.approx(7 / 40)
    assert report["low"] < report["difference"] < report["high"]
    assert [flip["id"] for flip in report["flips"]["lost"]] == ["38", "39"]
    text = "\n".join(paired_lines(report, ("A", "B")))
    assert "A: before 0" in text and "B: after 0" in text and "gained 9, lost 2" in text


def test_a_null_says_what_could_have_been_seen() -> None:
    report = paired_report(items([True, False] * 20), items([False, True] + [True, False] * 19))
    assert report["p"] == 1.0 and report["detectable"] > 0
    assert any("could have shown" in line for line in paired_lines(report, ("A", "B")))
    same = paired_report(items([True, False]), items([True, False]))
    assert same["detectable"] is None and any(
        "no item flipped" in line for line in paired_lines(same, ("A", "B"))
    )


def test_credit_in_part_has_no_flips_whichever_run_has_it() -> None:
    whole, part = items([True, False] * 6), items([True, False] * 6)
    part[0]["correct"] = 0.5
    for a, b in ((whole, part), (part, whole)):
        report = paired_report(a, b)
        assert report["metric"] == "accuracy" and "gained" not in report and 0 <= report["p"] <= 1


def test_losses_are_compared_by_their_difference() -> None:
    a = [{"id": str(i), "loss": 2.0 + i % 3, "tokens": 5} for i in range(30)]
    b = [{**item, "loss": item["loss"] - 0.5} for item in a]
    report = paired_report(a, b)
    assert (
        report["metric"] == "loss" and report["difference"] == pytest.approx(-0.5) and "gained" not in report
    )
