"""Worked problems: GSM8K, MATH, SVAMP, ASDiv, MAWPS."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from ..config import SourceConfig
from .base import Row, field, fill, string

PROMPT = "{question}\nThe answer is: "
MATH_PROMPT = "Problem: {question}\nSolution: "


def gsm8k(raw: RawRow, where: str, config: SourceConfig) -> Iterator[Row]:
    """Style ``rationale``: the worked solution with its ``#### n``; style ``answer``: the number alone."""
    question, solution = string(raw, where, "question"), string(raw, where, "answer")
    if "####" not in solution:
        raise DataError(f"{where}: field 'answer' has no '#### <number>' line")
    gold = solution.rsplit("####", 1)[1].strip().replace(",", "")
    row = {
        "prompt": fill(config, PROMPT, where, question=question),
        "completion": gold if config.style == "answer" else solution.strip(),
        "answer": gold,
        "meta_question": question,
    }
    for name in ("family", "difficulty", "operations", "structure"):
        if name in raw:
            row[name if name == "family" else f"meta_{name}"] = raw[name]
    yield row


def last_boxed(text: str) -> str | None:
    """The content of the last complete ``\\boxed{...}`` (or ``\\boxed x``), braces balanced."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*", text))):
        begin = match.end()
        if begin < len(text) and text[begin] != "{":
            return text[begin : begin + 1].strip() or None
        depth = 0
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin + 1 : position].strip()
    return None


def math(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """Hendrycks' MATH and MATH-500: LaTeX, the gold answer in the solution's last box (or in ``answer``)."""
    question, solution = string(raw, where, "problem", "question"), string(raw, where, "solution")
    gold = raw.get("answer") or last_boxed(solution)
    if not gold:
        raise DataError(f"{where}: field 'solution' has no \\boxed{{...}} and there is no field 'answer'")
    row = {
        "prompt": fill(config, MATH_PROMPT, where, question=question),
        "completion": str(gold) if config.style == "answer" else solution.strip(),
        "answer": str(gold),
        "meta_question": question,
        "meta_level": str(raw.get("level", "")),
    }
    family = raw.get("type") or raw.get("subject")
    yield row | ({"family": str(family)} if family else {})


def _number(value: object) -> str:
    text = str(value).strip()
    return text[:-2] if text.endswith(".0") else text


def arithmetic(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """SVAMP (``Body``, ``Question``, ``Answer``), ASDiv (``body``, ``question``, ``answer``), MAWPS (``question`` or
    ``sQuestion``, ``result`` or ``lSolutions``). Style ``rationale`` trains the equation and ``#### n``.
    """
    body = str(raw.get("Body") or raw.get("body") or "").strip()
    question = string(raw, where, "Question", "question", "sQuestion", "question_concat").strip()
    question = f"{body} {question}".strip() if body and not question.startswith(body) else question
    given = field(raw, where, "Answer", "answer", "result", "lSolutions")
    gold = _number(given[0] if isinstance(given, list) and given else given)
    number = re.match(r"[-+]?[\d,.]*\d", gold)  # ASDiv writes "9 (apples)"
    gold = number.group().replace(",", "") if number and "(" in gold else gold
    equation = raw.get("Equation") or raw.get("formula") or raw.get("expression") or raw.get("lEquations")
    equation = equation[0] if isinstance(equation, list) and equation else equation
    worked = f"{equation}\n#### {gold}" if equation else f"#### {gold}"
    row = {
        "prompt": fill(config, PROMPT, where, question=question),
        "completion": gold if config.style == "answer" else worked,
        "answer": gold,
        "meta_question": question,
    }
    family = raw.get("Type") or raw.get("solution_type") or raw.get("solution-type")
    yield row | ({"family": str(family)} if family else {})
