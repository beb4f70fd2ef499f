"""Which checkpoints a run has: by their names, without opening any of them."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = Path(output_dir).glob("checkpoint-*")
    numbered = [path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(numbered, key=lambda path: -int(path.name.split("-")[1]))
