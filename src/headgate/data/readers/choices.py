"""Questions with options: ARC, OpenBookQA, MMLU, BoolQ; and BIG-Bench Hard, whose targets are options or text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from ..config import SourceConfig
from .base import Row, field, fill, string

PROMPT = "Question: {question}\n{options}\nAnswer: "
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lettered(question: str, options: Sequence[object], right: int, where: str, config: SourceConfig) -> Row:
    """The row of one question: options under letters, the letter as the completion and the answer."""
    if not 0 <= right < len(options):
        raise DataError(f"{where}: the answer is option {right + 1} of {len(options)}")
    listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))
    return {
        "prompt": fill(config, PROMPT, where, question=question, options=listed),
        "completion": LETTERS[right],
        "answer": LETTERS[right],
        "choices": [str(option) for option in options],
        "meta_question": question,
    }


def arc(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """ARC and OpenBookQA: ``question`` (or ``question_stem``), ``choices`` with ``text`` and ``label``, ``answerKey``."""
    question, choices = string(raw, where, "question", "question_stem"), field(raw, where, "choices")
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    labels, key = [str(label) for label in choices["label"]], string(raw, where, "answerKey").strip()
    if key not in labels:
        raise DataError(f"{where}: answerKey '{key}' is none of the labels {', '.join(labels)}")
    yield lettered(question, choices["text"], labels.index(key), where, config)


def mmlu(raw: RawRow, where: str, config: SourceConfig) -> Iterator[Row]:
    """``question``, ``choices`` (or ``choice0`` ... / ``A`` ...), ``answer`` as an index or a letter, ``subject``."""
    question, options = string(raw, where, "question"), raw.get("choices")
    if options is None:
        names = [f"choice{i}" for i in range(10)] if "choice0" in raw else list(LETTERS[:10])
        options = [raw[name] for name in names if raw.get(name) is not None]
    key = string(raw, where, "answer").strip()
    right = int(key) if key.isdigit() else LETTERS.find(key) if len(key) == 1 else -1
    if not options or right < 0:
        raise DataError(f"{where}: answer '{key}' with {len(options)} options is no multiple choice")
    row = lettered(question, options, right, where, config)
    subject = raw.get("subject") or subject_of(where)
    yield row | ({"family": str(subject)} if subject else {})


def subject_of(where: str) -> str | None:
    """MMLU's CSV files carry the subject in their name: ``.../anatomy_dev.csv:2``."""
    match = re.search(r"([a-z_]+)_(?:dev|val|test)\.csv", where)
    return match.group(1) if match else None


def boolq(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """``passage``, ``question``, ``answer`` (true or false), as a choice of yes and no."""
    passage, question = string(raw, where, "passage"), string(raw, where, "question")
    key = str(field(raw, where, "answer", "label")).lower()
    if key not in ("true", "false", "0", "1"):
        raise DataError(f"{where}: answer '{key}' is neither true nor false")
    row = lettered(f"{passage}\n{question}?", ["yes", "no"], 0 if key in ("true", "1") else 1, where, config)
    yield row


def bbh(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """BIG-Bench Hard: ``input`` and ``target``; ``(A)`` where the input lists options, text otherwise."""
    question, target = string(raw, where, "input"), string(raw, where, "target").strip()
    row: Row = {
        "prompt": fill(config, "Q: {question}\nA: ", where, question=question),
        "completion": target,
        "answer": target,
        "meta_question": question,
    }
    options = re.findall(r"^\(([A-Z])\) (.+)$", question, re.MULTILINE)
    if options and (match := re.fullmatch(r"\(([A-Z])\)", target)):
        row |= {"answer": match.group(1), "choices": [text for _, text in options]}
    yield row | ({"family": str(raw["task"])} if raw.get("task") else {})
