"""The folder of what is prepared once: normalised rows, token stores, digests. Safe to delete at any time.

``HEADGATE_CACHE`` names it; without it, ``$XDG_CACHE_HOME/headgate`` (``~/.cache/headgate``). Entries are folders
named by a hash of everything they were made from, filled under a lock, and complete once their ``done.json``
is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

DONE = "done.json"


def cache_root() -> Path:
    """The cache folder, made where it is missing; a temporary one, with a warning, where it cannot be written."""
    given = os.environ.get("HEADGATE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(given) if given else Path(base) / "headgate"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError:
        pass
    return _temporary(str(root))


@cache
def _temporary(wanted: str) -> Path:
    warnings.warn(f"{wanted} cannot be written: data is prepared anew by every process; set HEADGATE_CACHE", stacklevel=3)  # fmt: skip
    return Path(tempfile.mkdtemp(prefix="headgate-"))


def digest(*parts: object) -> str:
    """A short name for what is given: equal for equal content, in every process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@cache
def code_version() -> str:
    """A hash of this package's source: what another version prepared is not read."""
    folder = Path(__file__).parent
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote, or None."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def entry(kind: str, key: str, fill: Callable[[Path], dict[str, object]]) -> tuple[Path, dict[str, Any]]:
    """The folder of ``key`` and its summary; ``fill(folder)`` makes it where it is missing, once, whoever asks.

    Other processes that want the same entry wait for the one that fills it.
    """
    folder = cache_root() / kind / key
    summary = read_json(folder / DONE)
    if summary is not None:
        return folder, summary
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        summary = read_json(folder / DONE)
        if summary is None:
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted process left
            folder.mkdir()
            try:
                summary = fill(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            write_json(folder / DONE, summary)
    return folder, summary
