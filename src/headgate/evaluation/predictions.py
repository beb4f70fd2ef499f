"""Per-item predictions on disk: what every paired comparison reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headgate.errors import CheckpointError, DamagedFile
from headgate.files import write_lines_atomically

Figures = dict[str, Any]
"""What training or a task reports under names of its own: mostly numbers; None, lists and families of numbers too."""
Item = dict[str, Any]
"""What a task keeps of one item: id, prompt hash, output, score, and fields of its own."""


def prompt_hash(prompt: str) -> str:
    """Names the item whatever its position: pairs are matched on it."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def write_predictions(path: Path, items: Iterable[Mapping[str, object]]) -> None:
    """One JSON line an item, written to the side and moved into place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines_atomically(path, (json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def read_predictions(path: Path) -> list[Item]:
    """The items of a predictions file. Raises CheckpointError when there is none."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: evaluate this run first")
    items = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                items.append(json.loads(line))
            except json.JSONDecodeError:
                raise DamagedFile(f"{path}, line {number} is damaged: evaluate this run again") from None
    return items
