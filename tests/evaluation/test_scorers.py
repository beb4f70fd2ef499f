"""Every scorer on hand-written outputs; what a scorer cannot read is None, never a guess."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.evaluation.scorers import (
    boxed,
    boxed_equal,
    first_number,
    flexible,
    last_integer,
    math_verify_equal,
    normalise,
    score,
    strict,
)

N = None
# output, strict, flexible (last number), first number, last run of digits
TABLE = [
    ("#### 72", "72", "72", "72", "72"),
    ("48/2 = 24\n48+24 = 72\n#### 72", "72", "72", "48", "72"),
    ("####72", "72", "72", "72", "72"),
    ("####\t72", "72", "72", "72", "72"),
    ("##### 72", "72", "72", "72", "72"),
    ("### 72", N, "72", "72", "72"),
    ("#### 1,234", "1234", "1234", "1234", "234"),
    ("#### 1,234,567", "1234567", "1234567", "1234567", "567"),
    ("#### 1,23,456", N, "23456", "1", "456"),
    ("#### 12,34", N, "34", "12", "34"),
    ("#### $5", "5", "5", "5", "5"),
    ("#### $1,000.50", "1000.5", "1000.5", "1000.5", "50"),
    ("#### -$5", "-5", "-5", "-5", "5"),
    ("#### €7", "7", "7", "7", "7"),
    ("#### £7.20", "7.2", "7.2", "7.2", "20"),
    ("#### -3", "-3", "-3", "-3", "3"),
    ("#### +3", "3", "3", "3", "3"),
    ("#### \u22123", "-3", "-3", "-3", "3"),
    ("It is \u22128 degrees", N, "-8", "-8", "8"),
    ("#### -0", "0", "0", "0", "0"),
    ("#### 0.0", "0", "0", "0", "0"),
    ("#### 3.50", "3.5", "3.5", "3.5", "50"),
    ("#### .5", "0.5", "0.5", "0.5", "5"),
    ("#### 5.", "5", "5", "5", "5"),
    ("#### 5.00", "5", "5", "5", "0"),
    ("#### 007", "7", "7", "7", "7"),
    ("#### 5\n#### 7", "5", "7", "5", "7"),
    ("#### five\n#### 7", "7", "7", "7", "7"),
    ("#### the answer is 5", N, "5", "5", "5"),
    ("####", N, N, N, N),
    ("", N, N, N, N),
    ("   \n\t", N, N, N, N),
    ("no number here", N, N, N, N),
    ("#### 18 eggs", "18", "18", "18", "18"),
    ("#### 18. She sells 4 more.", "18", "4", "18", "4"),
    ("#### 50%", "50", "50", "50", "50"),
    ("#### 1/2", "1", "2", "1", "2"),
    ("The answer is 3/4.", N, "4", "3", "4"),
    ("5kg", N, "5", "5", "5"),
    ("on the 5th", N, "5", "5", "5"),
    ("room A12", N, N, N, "12"),
    ("x1 = 4", N, "4", "4", "4"),
    ("10-5", N, "5", "10", "5"),
    ("10 - 5 = 5", N, "5", "10", "5"),
    ("x=-3", N, "-3", "-3", "3"),
    ("(42)", N, "42", "42", "42"),
    ("**42**", N, "42", "42", "42"),
    ("$42$", N, "42", "42", "42"),
    ("version 1.2.3", N, "1.2", "1.2", "3"),
    ("4:30", N, "30", "4", "30"),
    ("between 3 and 5", N, "5", "3", "5"),
    ("3–5 apples", N, "5", "3", "5"),
    ("<<48/2=24>>24 clips", N, "24", "48", "24"),
    ("2,000 and 3,000", N, "3000", "2000", "0"),
    ("1,2,3", N, "3", "1", "3"),
    ("the answer is 12,", N, "12", "12", "12"),
    ("#### 1e3", "1000", "1000", "1000", "3"),
    ("#### 2.5E-1", "0.25", "0.25", "0.25", "1"),
    ("#### 1e999999999", N, N, N, "999999999"),
    ("3eggs", N, "3", "3", "3"),
    ("#### " + "9" * 60, "9" * 60, "9" * 60, "9" * 60, "9" * 60),
    ("9" * 60 + ".0", N, "9" * 60, "9" * 60, "0"),
    ("#### ,", N, N, N, N),
    ("#### $", N, N, N, N),
    ("#### -", N, N, N, N),
    ("#### ٣", "3", "3", "3", "3"),
    ("####  \n72", N, "72", "72", "72"),
    ("Answer: 5\x00", N, "5", "5", "5"),
    ("#### 72<|endoftext|>", "72", "72", "72", "72"),
    ("\\boxed{72}", N, "72", "72", "72"),
    ("NaN inf", N, N, N, N),
    ("####  -1,000", "-1000", "-1000", "-1000", "0"),
    ("I think 12 ... no, 13 ... no, #### 14 or 15", "14", "15", "12", "15"),
]


def test_table_is_long_enough_and_has_no_duplicates() -> None:
    assert len(TABLE) >= 60 and len({row[0] for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("output", "wanted", "last", "first", "digits"), TABLE)
def test_table(
    output: str, wanted: str | None, last: str | None, first: str | None, digits: str | None
) -> None:
    assert strict(output) == wanted
    assert flexible(output) == last
    assert first_number(output) == first
    found = last_integer(output)
    assert ((found and found.lstrip("0")) or found) == ((digits and digits.lstrip("0")) or digits)


BOXED = [
    ("so \\boxed{5}", "5"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{2", None),
    ("\\boxed{1} and \\boxed{2", "1"),
    ("\\boxed{a{b}c} d}", "a{b}c"),
    ("boxed{3}", None),
    ("\\boxed{}", ""),
    ("", None),
]


@pytest.mark.parametrize(("output", "content"), BOXED)
def test_boxed(output: str, content: str | None) -> None:
    assert boxed(output) == content


@pytest.mark.parametrize(
    ("gold", "output", "equal"),
    [
        ("72", "The answer is 72.", True),
        ("72", "The answer is 73.", False),
        ("\\frac{1}{2}", "$0.5$", True),
        ("\\frac{1}{2}", "$\\frac{2}{4}$", True),
        ("(x+1)^2", "$x^2 + 2x + 1$", True),
        ("5", "", False),
        ("5", "\\boxed{", False),
        ("\\sqrt{8}", "$2\\sqrt{2}$", True),
        ("{1, 2}", "$\\{2, 1\\}$", True),
    ],
)
def test_math_verify(gold: str, output: str, equal: bool) -> None:
    gold = f"${gold}$" if gold.startswith(("(", "{")) else gold
    gold = gold.replace("{1, 2}", "\\{1, 2\\}")
    assert math_verify_equal(gold, output) is equal


def test_boxed_answers_of_the_math_style() -> None:
    assert boxed_equal("\\frac{3}{4}", "thus \\boxed{0.75}")
    assert boxed_equal("1000", "\\boxed{1,000}")
    assert boxed_equal("x+1", "\\boxed{x+1}")
    assert not boxed_equal("3", "the answer is 3"), "without a box there is no boxed answer"


def test_no_output_holds_up_the_scorer() -> None:
    started = time.monotonic()
    for output in ("$9^{9^{9^{9}}}$", "$" + "(" * 3000 + "$", "#### " + "1," * 20_000):
        assert score(output, "5")["math_verify"] is False
    assert time.monotonic() - started < 60, "three answers at most, and starting anew"
    assert math_verify_equal("5", "it is 5"), "the scorer works again afterwards"


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3))
def test_one_spelling_for_each_value(value) -> None:  # type: ignore[no-untyped-def]
    plain = normalise(str(value))
    assert plain == normalise(f"{value:,}") == normalise(f"${value}") == normalise(plain)
    assert strict(f"so\n#### {value:,}\n") == plain


@given(st.text(max_size=200))
def test_scorers_never_raise_and_give_normal_forms(text: str) -> None:
    for parser in (strict, flexible, first_number, last_integer):
        found = parser(text)
        assert found is None or normalise(found) == found


@pytest.mark.parametrize("scorer", ["strict", "flexible", "first_number", "last_integer", "number"])
def test_a_numeric_scorer_needs_a_number_on_both_sides(scorer: str) -> None:
    """Equal numbers are equal; nothing found on one side, or on both, is no match."""
    assert score("so it is 12\n#### 12", "12.0")[scorer] is True
    assert score("so it is 12\n#### 12", "13")[scorer] is False
    assert score("no idea", "12")[scorer] is False
    assert score("no idea", "none at all")[scorer] is False
