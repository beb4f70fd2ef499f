"""Tags that supervise a router's first stage: which experts an example should use, from its text alone."""

from __future__ import annotations

import hashlib
import re

OPERATIONS = ("+", "-", "*", "/")
_CUES = {
    "+": ("more", "total", "altogether", "in all", "sum", "plus", "adds", "and then", "combined"),
    "-": ("left", "less", "fewer", "remain", "gives", "loses", "change", "spends", "difference", "minus"),
    "*": ("each", "times", "every", "twice", "triple", "per ", "double", "dozen", "pair"),
    "/": ("half", "share", "split", "divide", "equally", "quarter", "third", "groups of", "average"),
}


def hash_tags(text: str, num_schemas: int, count: int = 1, seed: int = 0) -> list[int]:
    """``count`` distinct tags from a keyed blake2b of the text: equal in every process, never Python's ``hash``."""
    tags: list[int] = []
    draw = 0
    while len(tags) < min(count, num_schemas):
        digest = hashlib.blake2b(f"{draw}:{text}".encode(), digest_size=8, key=str(seed).encode()).digest()
        tag = int.from_bytes(digest, "big") % num_schemas
        if tag not in tags:
            tags.append(tag)
        draw += 1
    return tags


def keyword_class(text: str) -> int:
    """0..7: the operation whose cue words occur most (+ - x /), twice: at most three numbers, or more."""
    lowered = text.lower()
    counts = [sum(lowered.count(cue) for cue in _CUES[operation]) for operation in OPERATIONS]
    many = len(re.findall(r"\d+(?:\.\d+)?", text)) > 3
    return counts.index(max(counts)) * 2 + many


def keyword_tags(text: str, num_schemas: int, count: int = 1, seed: int = 0) -> list[int]:
    """``count`` tags among the ``num_schemas / 8`` that belong to the text's keyword class."""
    width = max(1, num_schemas // 8)
    start = keyword_class(text) * width % num_schemas
    return [start + tag for tag in hash_tags(text, width, count, seed)]
