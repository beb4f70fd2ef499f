"""Numbers in text: one spelling a value, and every number of an output in order."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
NUMBER = re.compile(rf"(?<![\w.])([-+]?\\?[$€£]?[-+]?(?:{DIGITS}|\.\d+))")
MINUS = str.maketrans({"\u2212": "-", "\uff0d": "-", "\ufe63": "-"})
LARGEST_EXPONENT = 4000


def normalise(number: str | None) -> str | None:
    """One spelling per value: no currency, thousands commas, plus sign, trailing zeros; ``-0`` is ``0``.

    None for what is no number, or one with an exponent beyond any answer.
    """
    if number is None:
        return None
    try:
        value = Decimal(number.translate(MINUS).translate({ord(c): None for c in ",$€£\\"}).strip())
    except InvalidOperation:
        return None
    if not value.is_finite() or abs(value.adjusted()) > LARGEST_EXPONENT:
        return None
    if value == 0:
        return "0"
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def numbers(output: str) -> list[str]:
    """Every number in the text, in order: signs, decimals and thousands commas understood."""
    return [
        value
        for match in NUMBER.finditer(output.translate(MINUS))
        if (value := normalise(match.group(1))) is not None
    ]
