"""The program in a model's answer."""

from __future__ import annotations

import re

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^\n`]*)\n(?P<code>.*?)(?:^[ \t]*(?P=mark)[`~]*[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_OTHER = re.compile(r"^\W*(?:bash|sh|shell|console|text|txt|output|json|java|javascript|js|c|cpp|c\+\+|sql|yaml)\b", re.I)  # fmt: skip
_BEGINS = re.compile(r"^[ \t]*(?:def|class|import|from|@|async)\b", re.MULTILINE)
_IMPORTS = re.compile(r"^(?:\s*(?:#.*|import\s.+|from\s+\S+\s+import\s.+)?\n?)+\Z")


def extract_code(output: str, entry_point: str | None = None) -> str:
    """Fenced code (```` ```python3 ````, ``~~~``, ...): the block that defines ``entry_point``, else the first, with
    the blocks before it that only import; or the text up to what is no longer code. Tabs are kept, carriage
    returns are not.
    """
    output = output.replace("\r\n", "\n")
    blocks = _blocks(output)
    if blocks:
        wanted = next(
            (i for i, block in enumerate(blocks) if entry_point and _defines(block, entry_point)), 0
        )
        if not entry_point and _IMPORTS.match(blocks[0]) and len(blocks) > 1:
            wanted = 1
        imports = [block for block in blocks[:wanted] if _IMPORTS.match(block)]
        return "\n".join([*imports, blocks[wanted]]).strip("\n")
    for marker in ("[BEGIN]", "[PYTHON]"):
        output = output.split(marker, 1)[-1]
    for marker in ("[DONE]", "[/PYTHON]", "```", "~~~"):
        output = output.split(marker, 1)[0]
    return output.strip("\n")


def _blocks(output: str) -> list[str]:
    """Fenced blocks that may be Python. A fence that only closes what began without one opens none."""
    first = re.search(r"`{3,}|~{3,}", output)
    if first is None:
        return []
    before, after = output[: first.start()], output[first.end() :]
    if first.group()[:3] not in after and _BEGINS.search(before):
        return []
    found = list(_FENCE.finditer(output))
    python = [m for m in found if not _OTHER.match(m.group("info"))] or found
    return [_dedented(m.group("code"), m.group("indent")) for m in python]


def _dedented(code: str, indent: str) -> str:
    """A block inside a list stands as far in as its fence."""
    if not indent:
        return code
    return "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))


def _defines(block: str, entry_point: str) -> bool:
    return re.search(rf"def\s+{re.escape(entry_point)}\b", block) is not None
