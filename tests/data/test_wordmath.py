"""Laws of the generated word problems."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.data import wordmath
from headgate.errors import DataError

STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
OPERATION = {
    "+": ("add", lambda a, b: a + b),
    "-": ("subtract", lambda a, b: a - b),
    "*": ("multiply", lambda a, b: a * b),
    "/": ("divide", lambda a, b: a / b),
}


@pytest.mark.parametrize("family", wordmath.TARGET_FAMILIES + wordmath.PRETRAINING_FAMILIES)
def test_every_calculation_and_final_answer_is_right(family):
    for row in wordmath.generate("train", 300, families=[family]):
        *lines, last = row["answer"].split("\n")
        steps = [STEP.findall(line) for line in lines]
        assert all(len(found) == 1 for found in steps), row["answer"]
        for (a, symbol, b, value, repeated), name in zip((found[0] for found in steps), row["operations"]):
            assert OPERATION[symbol][0] == name
            assert OPERATION[symbol][1](int(a), int(b)) == int(value) == int(repeated)
        assert last == f"#### {steps[-1][0][3]}"
        assert len(lines) == row["difficulty"] == len(row["operations"])


@pytest.mark.parametrize("family", wordmath.TARGET_FAMILIES)
def test_numbers_of_the_question_feed_the_solution(family):
    """Every number of the question is used, and every number used is stated, an earlier result or a known fact."""
    for row in wordmath.generate("train", 200, families=[family]):
        stated = set(re.findall(r"\d+", row["question"]))
        known = set(stated) | {"2", "3", "4", "5", "7", "12"}
        used = set()
        for a, _, b, value, _ in STEP.findall(row["answer"]):
            assert {a, b} <= known, row
            used |= {a, b}
            known.add(value)
        assert stated <= used, row


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] if i else []) for i, f in enumerate(wordmath.TARGET_FAMILIES)],
)
def test_each_target_family_has_100_000_distinct_problems(family):
    """Structures alone: other names and words are not counted. Exact enumeration, stopped at the bound."""
    spec = wordmath.FAMILIES[family]
    structures = (spec.structure(t, numbers) for t in spec.templates for numbers in t.space())
    assert len(set(itertools.islice(structures, 100_000))) == 100_000


def test_splits_are_disjoint_at_any_seed():
    structures = {
        split: {row["structure"] for seed in (0, 1, 7) for row in wordmath.generate(split, 1500, seed=seed)}
        for split in wordmath.SPLITS
    }
    assert all(not (structures[a] & structures[b]) for a, b in itertools.combinations(structures, 2))
    redundant = wordmath.generate("test", 800, redundancy=0.6, seed=3)
    assert {wordmath.split_of(row["structure"]) for row in redundant} == {"test"}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 120))
def test_rows_are_distinct_and_a_function_of_the_seed(seed, count):
    rows = wordmath.generate("train", count, seed=seed)
    assert len({row["question"] for row in rows}) == len({row["example_id"] for row in rows}) == count
    assert rows == wordmath.generate("train", count, seed=seed)
    assert rows[: count // 2] == wordmath.generate("train", count // 2, seed=seed)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_paraphrase_keeps_structure_and_answer_and_changes_words(seed):
    (row,) = wordmath.generate("train", 1, seed=seed)
    told = wordmath.paraphrase(row)
    assert told["question"] != row["question"]
    assert (told["structure"], told["operations"]) == (row["structure"], row["operations"])
    assert told["answer"].split("####")[1] == row["answer"].split("####")[1]


def test_redundancy_is_the_share_of_near_duplicates():
    rows = wordmath.generate("train", 3000, redundancy=0.5, difficulty=3, seed=4)
    seen, near = set(), 0
    for row in rows:
        family, template, numbers, _ = row["example_id"].split(".")
        values = tuple(map(int, numbers.split("-")))
        neighbours = {values} | {
            tuple(v + d * (i == j) for j, v in enumerate(values)) for i in range(len(values)) for d in (-1, 1)
        }
        near += any((family, template, neighbour) in seen for neighbour in neighbours)
        seen.add((family, template, values))
    assert 0.45 < near / len(rows) < 0.62
    assert len({row["structure"] for row in wordmath.generate("train", 3000, difficulty=3, seed=4)}) == 3000


def test_difficulty_and_families_are_respected():
    rows = wordmath.generate("train", 200, families=["farm", "sports"], difficulty=(1, 3))
    assert {row["family"] for row in rows} == {"farm", "sports"}
    assert {row["difficulty"] for row in rows} == {1, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="dev", count=1), "no split 'dev'"),
        (dict(split="train", count=1, families=["shoping"]), "did you mean 'shopping'"),
        (dict(split="train", count=1, difficulty=9), "difficulty"),
        (dict(split="train", count=1, redundancy=1.0), "redundancy=1.0"),
        (dict(split="train", count=10**6, families=["travel"], difficulty=1), "fewer rows"),
    ],
)
def test_bad_requests_say_what_and_how(arguments, message):
    with pytest.raises(DataError, match=re.escape(message)):
        wordmath.generate(**arguments)


def test_rows_do_not_depend_on_the_process():
    code = "import json; from headgate.data import wordmath; print(json.dumps(wordmath.generate('train', 20, seed=5)))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(printed.stdout) == wordmath.generate("train", 20, seed=5)
