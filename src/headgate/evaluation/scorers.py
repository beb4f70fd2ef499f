"""Scorers of worked answers: pure functions from an output text to a parsed answer.

Reported side by side, because a model can look good under one and poor under another: ``strict`` needs the
``#### n`` line, ``flexible`` takes the last number anywhere, ``first_number`` the first, ``last_integer`` the
last run of digits, ``boxed`` LaTeX's ``\\boxed{}``, ``math_verify`` whatever that library parses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from headgate.evaluation.math_verifier import math_verify_equal

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(rf"(?<![\w.])([-+]?[$€£]?(?:{_DIGITS}|\.\d+))")
_STRICT = re.compile(rf"####[ \t]*([-+]?[$€£]?(?:{_DIGITS}|\.\d+))(?![\d,]*\d)")
_MINUS = str.maketrans({"\u2212": "-", "\uff0d": "-", "\ufe63": "-"})
LARGEST_EXPONENT = 4000


def normalise(number: str | None) -> str | None:
    """One spelling per value: no currency, thousands commas, plus sign, trailing zeros; ``-0`` is ``0``.

    None for what is no number, or one with an exponent beyond any answer.
    """
    if number is None:
        return None
    try:
        value = Decimal(number.translate(_MINUS).translate({ord(c): None for c in ",$€£"}).strip())
    except InvalidOperation:
        return None
    if not value.is_finite() or abs(value.adjusted()) > LARGEST_EXPONENT:
        return None
    if value == 0:
        return "0"
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def strict(output: str) -> str | None:
    """The number after the first ``####``, as GSM8K's own answers are marked."""
    found = _STRICT.search(output.translate(_MINUS))
    return normalise(found.group(1)) if found else None


def numbers(output: str) -> list[str]:
    """Every number in the text, in order: signs, decimals and thousands commas understood."""
    return [
        value
        for match in _NUMBER.finditer(output.translate(_MINUS))
        if (value := normalise(match.group(1))) is not None
    ]


def flexible(output: str) -> str | None:
    """The last number anywhere in the output."""
    found = numbers(output)
    return found[-1] if found else None


def first_number(output: str) -> str | None:
    """The first number anywhere in the output."""
    found = numbers(output)
    return found[0] if found else None


def last_integer(output: str) -> str | None:
    """The last run of digits, as SchemaBank's released code scored (signs and decimals are lost)."""
    found = re.findall(r"\d+", output)
    return normalise(found[-1]) if found else None


def boxed(output: str) -> str | None:
    """The content of the last complete ``\\boxed{...}``, braces balanced."""
    start = output.rfind("\\boxed{")
    while start != -1:
        depth, begin = 0, start + len("\\boxed")
        for position in range(begin, len(output)):
            depth += {"{": 1, "}": -1}.get(output[position], 0)
            if depth == 0:
                return output[begin + 1 : position].strip()
        start = output.rfind("\\boxed{", 0, start)
    return None


PARSERS: dict[str, Callable[[str], str | None]] = {
    "strict": strict,
    "flexible": flexible,
    "first_number": first_number,
    "last_integer": last_integer,
}


def boxed_equal(gold: str, output: str) -> bool:
    """Whether the last ``\boxed{}`` holds the gold answer: the same number, the same text, or the same mathematics."""
    found = boxed(output)
    if found is None:
        return False
    wanted = normalise(gold)
    if found == gold.strip() or (wanted is not None and normalise(found) == wanted):
        return True
    return math_verify_equal(gold, f"\\boxed{{{found}}}")


def score(output: str, gold: str) -> dict[str, bool]:
    """Every scorer's verdict on one output. ``gold`` is the bare answer: a number, or LaTeX."""
    wanted = normalise(gold)
    verdicts = {name: wanted is not None and parser(output) == wanted for name, parser in PARSERS.items()}
    verdicts["boxed"] = boxed_equal(gold, output)
    verdicts["math_verify"] = math_verify_equal(gold, output)
    return verdicts
