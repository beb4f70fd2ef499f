"""Scorers: whether an output gives a gold answer.

Reported side by side, because a model can look good under one and poor under another: ``strict`` needs the
``#### n`` line, ``flexible`` takes the last number anywhere, ``first_number`` the first, ``last_integer`` the
last run of digits, ``number`` the one that is boxed or stated, ``boxed`` LaTeX's ``\\boxed{}``, ``math`` what is
boxed, stated or set as the last formula, ``math_verify`` whatever that library parses, ``choice`` a letter (or an
option's text), ``text`` the normalised words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from headgate.errors import DataError
from headgate.evaluation.extraction import boxed, choice, marked_number, mathematics, plain, stated, texts
from headgate.evaluation.latex import latex_equal
from headgate.evaluation.math_verifier import math_verify_equal
from headgate.evaluation.numbers import DIGITS, MINUS, normalise, numbers

__all__ = ["SCORERS", "boxed", "check_golds", "math_verify_equal", "normalise", "numbers", "score"]
_STRICT = re.compile(rf"####[ \t]*\*{{0,2}}[ \t]*(\$?[-+]?\\?[$€£]?[-+]?(?:{DIGITS}|\.\d+))(?![\d,]*\d)")


def strict(output: str) -> str | None:
    """The number after the first ``####``, as GSM8K's own answers are marked."""
    match = _STRICT.search(output.translate(MINUS))
    return normalise(match.group(1)) if match else None


def flexible(output: str) -> str | None:
    """The last number anywhere in the output."""
    listed = numbers(output)
    return listed[-1] if listed else None


def first_number(output: str) -> str | None:
    """The first number anywhere in the output."""
    listed = numbers(output)
    return listed[0] if listed else None


def last_integer(output: str) -> str | None:
    """The last run of digits, as SchemaBank's released code scored (signs and decimals are lost)."""
    runs = re.findall(r"\d+", output)
    return normalise(runs[-1]) if runs else None


def boxed_equal(gold: str, output: str) -> bool:
    """Whether the last ``\\boxed{}`` holds the gold answer: the same number, the same text, or the same mathematics."""
    content = boxed(output)
    return content is not None and latex_equal(gold, content)


def math_equal(gold: str, output: str) -> bool:
    """Whether the output's answer is the gold one; where it is marked in no way, math-verify looks for it."""
    if any(latex_equal(gold, candidate) for candidate in mathematics(output)):
        return True
    marked = boxed(output) is not None or stated(output) is not None or "$" in output or "\\(" in output
    return not marked and math_verify_equal(gold, output)


def _numeric(parser: Callable[[str], str | None]) -> Callable[[str, str, Sequence[str]], bool]:
    def equal(output: str, gold: str, choices: Sequence[str]) -> bool:
        wanted = normalise(gold)
        return wanted is not None and parser(output) == wanted

    return equal


def choice_equal(output: str, gold: str, choices: Sequence[str]) -> bool:
    """Whether the output chooses the gold letter."""
    letter = choice(gold, choices)
    return letter is not None and choice(output, choices) == letter


def text_equal(output: str, gold: str, choices: Sequence[str] = ()) -> bool:
    """Whether the output, or what it states as its answer, is the gold text."""
    return any(plain(candidate) == plain(gold) for candidate in texts(output))


PARSERS: dict[str, Callable[[str], str | None]] = {
    "strict": strict, "flexible": flexible, "first_number": first_number, "last_integer": last_integer,
    "number": marked_number,
}  # fmt: skip
SCORERS: dict[str, Callable[[str, str, Sequence[str]], bool]] = {
    **{name: _numeric(parser) for name, parser in PARSERS.items()},
    "boxed": lambda output, gold, choices: boxed_equal(gold, output),
    "math": lambda output, gold, choices: math_equal(gold, output),
    "math_verify": lambda output, gold, choices: math_verify_equal(gold, output),
    "choice": choice_equal,
    "text": text_equal,
}
_WRITTEN = {
    "strict": "#### {}",
    "boxed": "\\boxed{{{}}}",
    "math": "\\boxed{{{}}}",
    "math_verify": "$\\boxed{{{}}}$",
}
"""How a scorer wants an answer written; bare where nothing is said."""


def score(output: str, gold: str | Iterable[str], choices: Sequence[str] = ()) -> dict[str, bool]:
    """Every scorer's verdict on one output; of several golds any will do. A gold is bare: a number, text, LaTeX."""
    golds = [gold] if isinstance(gold, str) else list(gold)
    return {name: any(equal(output, one, choices) for one in golds) for name, equal in SCORERS.items()}


def written(scorer: str, gold: str) -> str:
    """The gold as an output that ``scorer`` reads."""
    return _WRITTEN.get(scorer, "{}").format(gold)


def suited(golds: Sequence[str], completions: Sequence[str], *, choices: bool, rationale: bool) -> str:
    """The scorer that reads answers like these: by the golds, and by how the completions mark them."""
    if choices:
        return "choice"
    if all(normalise(gold) is not None for gold in golds):
        if rationale and all("####" in text for text in completions):
            return "strict"
        return "math" if any("\\boxed" in text for text in completions) else "flexible"
    return (
        "math" if any("\\boxed" in text or "\\" in gold for text, gold in zip(completions, golds)) else "text"
    )


def check_golds(
    scorer: str, golds: Sequence[Sequence[str]], choices: Sequence[Sequence[str]], ids: Sequence[str]
) -> None:
    """Raise DataError naming the first row whose gold answer ``scorer`` cannot match, before anything is generated."""
    for row, (several, options) in enumerate(zip(golds, choices)):
        for gold in several:
            if not SCORERS[scorer](written(scorer, gold), gold, options):
                others = [n for n in SCORERS if n != scorer and SCORERS[n](written(n, gold), gold, options)]
                cure = f"set scorer: {others[-1]}" if others else "correct the row"
                raise DataError(
                    f"row '{ids[row]}': the scorer {scorer} cannot match the gold answer {gold!r}, whatever a model "
                    f"writes: {cure}"
                )
