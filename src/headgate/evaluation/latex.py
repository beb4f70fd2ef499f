"""One spelling for LaTeX answers that are written in several ways, and whether two of them are the same.

What only sets an answer (spacing, ``\\left``, ``\\dfrac``, a unit in ``\\text{}``, degrees, currency) is taken away, as
Lewkowycz et al. (Minerva, 2022, appendix D) do. What is still unequal is asked of math-verify, gold and answer both
marked as LaTeX.
"""

from __future__ import annotations

import re

from headgate.evaluation.math_verifier import math_verify_equal
from headgate.evaluation.numbers import normalise

_SPACING = re.compile(
    r"\\[,;:!> ]|\\q?quad\b|~|\\(?:left|right|displaystyle|textstyle|limits)\b|\\[bB]igg?[lr]?\b"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox|mathbf|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=[\d}])\s*(?:\\(?:text|mbox|mathrm|textrm)\s*\{\s*(?:square |cubic )?[a-zA-Z./ ]+\}(?:\^\{?[23]\}?)?|"
    r"\^\{?\\circ\}?|\\degrees?\b|\\?%)\s*$"
)
_BARE_FRACTION = re.compile(
    r"\\frac\s*(\d)\s*(\d)(?!\d)|\\frac\s*(\d)\s*\{|\\frac\s*(\{[^{}]*\})\s*(\d)(?!\d)"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|,)(?=\d{3}(?!\d))")


def latex_form(answer: str) -> str:
    """The answer in its plain spelling; equal for answers that differ only in how they are set."""
    text = answer.strip().strip("$").strip()
    text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text, flags=re.DOTALL).rstrip(".").strip()
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    text = text.replace("\\$", "").replace("\u2212", "-").replace("\\cdot", "*").replace("\\times", "*")
    text = (
        text.replace("\\leq", "\\le").replace("\\geq", "\\ge").replace("\\neq", "\\ne").replace("\\mid", "|")
    )
    if not _LIST.search(text):
        text = _THOUSANDS.sub("", text)
    text = _SPACING.sub("", text)
    text = _UNIT.sub("", text)
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?", "", text)
    for _ in range(3):
        text = _BARE_FRACTION.sub(_braced, text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\{(\w)\}", r"^\1", re.sub(r"_\{(\w)\}", r"_\1", text))
    text = re.sub(r"^[a-zA-Z](?:\([a-z]\))?\s*=\s*(?=[^=]+$)", "", text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"\s+", "", text)
    return text if "," in text else normalise(text) or text  # a comma that is left makes a list


_LIST = re.compile(r"[(\[{]\s*-?\d+\s*,|\d,\s")


def _braced(match: re.Match[str]) -> str:
    a, b, c, d, e = match.groups()
    if a is not None:
        return rf"\frac{{{a}}}{{{b}}}"
    return rf"\frac{{{c}}}{{" if c is not None else rf"\frac{d}{{{e}}}"


def latex_equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same mathematics, or the same text."""
    if not answer.strip() or not gold.strip():
        return False
    left, right = latex_form(gold), latex_form(answer)
    if left == right or left.casefold() == right.casefold() != "":
        return True
    if normalise(left) is not None and (normalise(right) is not None or re.fullmatch(r"[\d,]+", right)):
        return False  # two numbers, or a number and a list: math-verify reads 100,80 as 10080
    return math_verify_equal(gold, f"${answer.strip().strip('$')}$")
