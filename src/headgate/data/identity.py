"""What data is, by content: a digest of every input of a data configuration, cheap to ask for again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from . import wordmath
from .cache import cache_root, digest, read_json, write_json
from .config import DataConfig, SourceConfig
from .files import find_files
from .readers import source_named


def content_digest(config: DataConfig | SourceConfig) -> str:
    """A digest of the content of every input that ``config`` names, for the identity of a run.

    Files by the SHA-256 of their bytes, in order; hub data by revision; generated problems by the version
    of their generator. The digest of a file is kept by (path, size, modification time), so asking again reads nothing.
    Raises DataError where a file is missing.
    """
    if isinstance(config, SourceConfig):
        return digest(_source(config))
    sources = [config.train, config.validation, *(config.stream or []), *config.watch.values()]
    sources += [skill.validation for skill in config.stream or []]
    return digest([_source(source) if source is not None else None for source in sources])


def _source(config: SourceConfig) -> object:
    if config.mix:
        return [_source(part) for part in config.mix]
    if config.path is not None and (Path(config.path).expanduser().exists() or not hub_like(config.path)):
        found = find_files(config.path, config.split, config.name)
        return [[file.name, file_digest(file)] for file in found.all]
    place = hub_place(config)
    if place is None:
        return ["generated", wordmath.VERSION]
    return ["hub", *place, hub_revision(place[0], config.revision)]


def hub_like(text: str) -> bool:
    """Whether a text has the form owner/name."""
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~")) and not Path(text).suffix


def hub_place(config: SourceConfig) -> tuple[str, str | None] | None:
    """(repository, configuration) on the hub that a source is read from; None for one that is not there."""
    if config.path is not None:
        return config.path, config.name
    source = source_named(config.source)
    if source is not None:
        return (source.hub[0], config.name or source.hub[1]) if source.hub else None
    return (config.source, config.name) if hub_like(config.source) else None


def hub_revision(repository: str, revision: str | None) -> str:
    """The commit that is read: the one asked for, else the one that the hub's cache holds, else ``main``."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.exists() else revision or "main"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read once for a path, size and modification time."""
    status = os.stat(path)
    key = digest(str(path.resolve()), status.st_size, status.st_mtime_ns)
    kept = cache_root() / "digests" / f"{key}.json"
    known = read_json(kept)
    if known is not None:
        return str(known)
    with path.open("rb") as file:
        value = _sha256(file)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, value)
    return value


def _sha256(file: BinaryIO) -> str:
    content = hashlib.sha256()
    while block := file.read(1 << 20):
        content.update(block)
    return content.hexdigest()
