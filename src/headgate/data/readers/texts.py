"""Plain text, whole; and long documents with questions: NarrativeQA, LongBench."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..config import SourceConfig
from .base import Row, field, fill, string

END_OF_TEXT = "<|endoftext|>"
_HEADING = re.compile(r"^ = [^=].* = *$", re.MULTILINE)
CONTEXT_PROMPT = "{context}\n\nQuestion: {question}\nAnswer: "


def text(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """One document a row (a text file is one), whole and as it is written.

    A string is divided only at ``options.separator``, or at ``<|endoftext|>``, which is no text. With
    ``options.chunk_characters`` each document becomes runs of whole lines of at most that many characters.
    """
    yield from _documents(_separated(_content(raw, where), config), config)


def wikitext(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """WikiText's files hold one article after the other: each is a document, from its top-level heading on."""
    content = _content(raw, where)
    starts = [match.start() for match in _HEADING.finditer(content)]
    if len(starts) < 2 or config.options.get("separator"):
        yield from text(raw, where, config)
        return
    parts = [content[: starts[0]], *(content[a:b] for a, b in zip(starts, [*starts[1:], len(content)]))]
    yield from _documents(parts, config)


def _content(raw: Mapping[str, object], where: str) -> str:
    return string(raw, where, "text", "content").replace("\r\n", "\n")


def _separated(content: str, config: SourceConfig) -> list[str]:
    separator = config.options.get("separator") or (END_OF_TEXT if END_OF_TEXT in content else None)
    return [part.strip("\n") for part in content.split(str(separator))] if separator else [content]


def _documents(parts: list[str], config: SourceConfig) -> Iterator[Row]:
    limit = config.options.get("chunk_characters")
    for part in parts:
        for piece in _chunks(part, int(limit)) if limit else [part]:
            if piece.strip():
                yield {"text": piece}


def _chunks(content: str, limit: int) -> Iterator[str]:
    held = ""
    for line in content.splitlines(keepends=True):
        if held and len(held) + len(line) > limit:
            yield held
            held = ""
        held += line
    yield held


def narrativeqa(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """``document`` (its text; ``style: answer`` its summary), ``question``, ``answers``: the first is trained."""
    document, question = field(raw, where, "document"), field(raw, where, "question")
    if isinstance(document, dict):
        summary = (document.get("summary") or {}).get("text")
        document = (summary if config.style == "answer" else None) or document.get("text") or summary
    question = question["text"] if isinstance(question, dict) else question
    answers = [a["text"] if isinstance(a, dict) else str(a) for a in field(raw, where, "answers")]
    yield _about(str(document), str(question), answers, where, config)


def longbench(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """LongBench and its kind: ``context``, ``input`` (or ``question``), ``answers``, ``dataset``."""
    answers = field(raw, where, "answers", "answer")
    answers = [str(a) for a in answers] if isinstance(answers, list) else [str(answers)]
    row = _about(string(raw, where, "context"), string(raw, where, "input", "question"), answers, where, config)  # fmt: skip
    yield row | ({"family": str(raw["dataset"])} if raw.get("dataset") else {})


def _about(context: str, question: str, answers: list[str], where: str, config: SourceConfig) -> Row:
    return {
        "prompt": fill(config, CONTEXT_PROMPT, where, context=context, question=question),
        "completion": answers[0],
        "answer": answers[0],
        "answers": answers,
        "meta_question": question,
    }
