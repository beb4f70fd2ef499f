"""Headgate's scorers agree with every hand label; where others do not is written down and stays as it is."""

from __future__ import annotations

import pytest

from headgate.errors import DataError
from headgate.evaluation.scorers import SCORERS, check_golds, score, suited

from .labelled import FILE, TABLE, disagreements, rows


def test_the_table_is_long_enough() -> None:
    assert len({row[:4] for row in rows()}) == len(rows()) >= 300


@pytest.mark.parametrize("key", TABLE, ids=lambda key: f"{key[0]} {key[1]}")
def test_every_label(key) -> None:
    scorer, gold, options = key
    right, wrong = TABLE[key]
    verdicts = {output: SCORERS[scorer](output, gold, options) for output in (*right, *wrong)}
    assert [output for output in right if not verdicts[output]] == []
    assert [output for output in wrong if verdicts[output]] == []


def test_other_scorers_verdicts_are_as_written_down() -> None:
    assert disagreements() == FILE.read_text(), "python -m tests.evaluation.labelled writes it again"


def test_of_several_golds_any_will_do() -> None:
    assert score("Rome", ["in Rome", "Rome"])["text"] and not score("Oslo", ["in Rome", "Rome"])["text"]


def test_a_gold_that_its_scorer_cannot_match_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"row 'b': the scorer strict cannot match the gold answer 'Yes'.*scorer: text"
    ):
        check_golds("strict", [["1"], ["Yes"]], [(), ()], ["a", "b"])
    with pytest.raises(DataError, match="scorer choice"):
        check_golds("choice", [["E"]], [("a", "b")], ["a"])


@pytest.mark.parametrize(
    ("golds", "completions", "choices", "rationale", "scorer"),
    [
        (["3"], ["so\n#### 3"], False, True, "strict"),
        (["3"], ["3"], False, False, "flexible"),
        (["3"], ["it is \\boxed{3}"], False, True, "math"),
        (["\\frac12"], ["..."], False, True, "math"),
        (["B"], ["B"], True, True, "choice"),
        (["Rome"], ["Rome"], False, True, "text"),
    ],
)
def test_the_scorer_follows_the_golds(golds, completions, choices, rationale, scorer) -> None:
    assert suited(golds, completions, choices=choices, rationale=rationale) == scorer
