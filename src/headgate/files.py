"""Files that a kill, a full disk or a power cut leaves whole: written to the side, synced, renamed, the folder synced.

Without the syncs a rename may reach the disk before the bytes that it names, and a crash then leaves an empty file
under the right name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from headgate.errors import DamagedFile

CHUNK = 1 << 20


def write_atomically(path: Path, text: str) -> None:
    """All of the text or none of it, whatever happens in between."""
    write_lines_atomically(path, [text])


def write_lines_atomically(path: Path, pieces: Iterable[str]) -> None:
    """As ``write_atomically``, piece by piece: the whole text need not fit in memory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """``content`` as JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=indent))


def read_json(path: Path) -> dict[str, Any]:
    """The file's mapping. Raises DamagedFile where it is empty, cut short, or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} is damaged (it holds a {type(content).__name__}, not a mapping)")
    return content


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or deleted in ``folder`` survive a power cut; not every platform has this."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system without it (some network mounts) keeps its own promises
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below ``folder``, and give them the modes that a plainly created file has."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(0o666 & ~_umask())  # some writers keep the 0600 of their temporary file
    sync_folder(folder)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            content.update(chunk)
    return content.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
