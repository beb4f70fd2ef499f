"""Where an output says its answer: in a box, behind ``####`` or "the answer is", on its last line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from headgate.evaluation.numbers import MINUS, normalise, numbers

_MARKER = re.compile(
    r"(?:####|(?:final\s+answer|correct\s+answer|correct\s+option|correct\s+choice|answer|réponse)\s*(?:is|:|=|would be)+)"
    r"\s*:?[ \t]*(?P<answer>[^\n]*)",
    re.IGNORECASE,
)
_SOLE = re.compile(r"^\W*(?P<letter>[A-Za-z])\W*$")
_LEADING = re.compile(r"^[\s*(\[]*(?P<letter>[A-Z])(?:\s*[.):\]*,]|\s*$|\s*\n)")

_TOLD = re.compile(r"^[\s*(\[]*(?P<letter>[B-HJ-Z]|A(?=\s+(?:because|since|as|for|and)\b))(?![\w'])")


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


def stated(output: str) -> str | None:
    """What follows the last "answer is", "Answer:" or ``####`` on its line (the next, where that is empty)."""
    matches = list(_MARKER.finditer(output))
    for match in reversed(matches):
        answer = match.group("answer").strip()
        if not answer:
            answer = next((line.strip() for line in output[match.end() :].splitlines() if line.strip()), "")
        if answer:
            return answer
    return None


def mathematics(output: str) -> list[str]:
    """Candidates for a LaTeX answer: the box decides; else what is stated, then the last formula."""
    content = boxed(output)
    if content is not None:
        return [content]
    answer = stated(output)
    formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", answer or output, re.DOTALL)
    if formulas:
        return [next(part for part in formulas[-1] if part)]
    if answer is not None:
        return [answer.strip("*").rstrip(".").strip()]
    stripped = output.strip()
    return (
        [stripped] if stripped and "\n" not in stripped else [stripped.splitlines()[-1]] if stripped else []
    )


def choice(output: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that an output chooses, or None: boxed, stated, leading, alone; or one option's whole text."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices) or 26]
    for place, told in ((boxed(output), True), (stated(output), True), (output, False)):
        if place is None:
            continue
        found = _letter(place, letters, told)
        if found is None:
            texts = [letters[i] for i, option in enumerate(choices) if plain(option) == plain(place)]
            found = texts[0] if len(texts) == 1 else None
        if found is not None:
            return found
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return _letter(last, letters)


def _letter(text: str, letters: str, told: bool = False) -> str | None:
    """``told``: the text is what an output states as its answer, so a letter may go on into a sentence."""
    text = re.sub(r"\\text(?:bf|rm)?\{([^{}]*)\}", r"\1", text.strip())
    text = re.sub(r"^(?:option|choice|answer)\s+", "", text, flags=re.IGNORECASE)
    for pattern in (_SOLE, _LEADING, *([_TOLD] if told else [])):
        match = pattern.match(text)
        if match and match.group("letter").upper() in letters:
            return match.group("letter").upper()
    inside = {m.group(1) for m in re.finditer(r"\(([A-Z])\)", text)} & set(letters)
    return inside.pop() if len(inside) == 1 else None


def marked_number(output: str) -> str | None:
    """The number in the box or stated as the answer; else the last one anywhere."""
    content = boxed(output)
    if content is not None:
        content = content.replace("{,}", ",")
        return normalise(re.sub(r"\\text\{[^{}]*\}|\\[!,; %$]|\^\{?\\circ\}?|[%°]", "", content)) or next(
            iter(numbers(content)), None
        )
    answer = stated(output)
    found = numbers(answer) if answer is not None else []
    if found:
        return found[0]
    everywhere = numbers(output)
    return everywhere[-1] if everywhere else None


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s%+\-*/=<>.]|(?<!\d)\.|\.(?!\d)|(?<!\w)-(?!\d)|_")


def plain(text: str) -> str:
    """Text without case, punctuation, articles and extra space (as SQuAD compares it); numbers in one spelling."""
    text = re.sub(r"\\text(?:bf|rm)?\{([^{}]*)\}", r"\1", text).translate(MINUS)
    text = re.sub(r"(?<![\w*])\*+(?=\w)|(?<=[\w.])\*+(?![\w*])", "", text)  # Markdown's emphasis
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.casefold())
    bare = " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text)).split())
    return normalise(bare) or bare or text.strip()


def texts(output: str) -> list[str]:
    """Candidates for a text answer: all of it; boxed or stated; the first line where neither is there."""
    places = [output, boxed(output), stated(output)]
    found = [place for place in places if place is not None]
    if len(found) == 1 and output.strip():
        found.append(output.strip().splitlines()[0])
    return found
