"""Per-item predictions on disk: what every paired comparison reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headgate.errors import CheckpointError


def prompt_hash(prompt: str) -> str:
    """Names the item whatever its position: pairs are matched on it."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def write_predictions(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """One JSON line an item, written to the side and moved into place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The items of a predictions file. Raises CheckpointError when there is none."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: evaluate this run first")
    return [json.loads(line) for line in path.read_text().splitlines() if line]
