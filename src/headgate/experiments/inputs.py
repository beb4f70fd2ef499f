"""What a run read: data, base weights, tokenizer, adapters, by content.

The recipe says where a run's inputs lie; two files that replaced each other there have the same recipe. Their digests
are kept beside the run, and a run whose inputs have changed is neither resumed nor taken for complete.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from pydantic import BaseModel

import headgate
from headgate.data.config import SourceConfig
from headgate.data.identity import content_digest
from headgate.errors import CheckpointError, DamagedFile
from headgate.experiments.recipe import Recipe
from headgate.files import digest

if TYPE_CHECKING:  # a run directory reads this file
    from headgate.experiments.run_directory import RunDirectory

WHOLE_UP_TO = 1 << 30
"""Bytes. A larger file is known by its size and its first MiB, which holds a safetensors file's header."""
HEADER = 1 << 20
PACKAGE = Path(headgate.__file__).parent
UNRESOLVED = "not in the local cache"


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Place in the recipe -> digest of what lies there now: of a file or folder, or the revision of a hub repository."""
    places: dict[str, str] = {}
    for place, source in _sources(recipe.data, "data"):
        places.setdefault(place, _source_digest(source))
    for index, task in enumerate(recipe.evaluation):
        places[f"evaluation.{index}"] = _source_digest(task)
    places["model.name_or_path"] = _model_digest(recipe.model.name_or_path, recipe.model.revision)
    if recipe.model.adapter is not None:
        places["model.adapter"] = _path_digest(Path(recipe.model.adapter))
    if recipe.entry is not None:
        from headgate.experiments.entry import entry_digest

        places["entry"] = entry_digest(recipe.entry)
    for name, options in recipe.methods.items():
        for key, value in _run_references(options):
            places[f"methods.{name}.{key}"] = _path_digest(Path(value) / "checkpoint")
    return places


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Places whose content differs; one that either side could not resolve is not compared."""
    return [
        place
        for place, content in now.items()
        if UNRESOLVED not in (content, before.get(place, UNRESOLVED)) and before[place] != content
    ]


def require_same_inputs(before: Mapping[str, str], now: Mapping[str, str], run: Path) -> None:
    """Raise CheckpointError, naming the places and the cure, where an input of ``run`` has changed."""
    changed = changed_inputs(before, now)
    if changed:
        raise CheckpointError(
            f"{run} was made from other inputs: {', '.join(changed)} changed since its inputs.json was written. Put them back, "
            "start over with --fresh, or give the run another name"
        )


def _sources(config: BaseModel, place: str) -> Iterator[tuple[str, SourceConfig]]:
    """Every source below a configuration, by its dotted place."""
    for name in type(config).model_fields:
        yield from _sources_in(getattr(config, name), f"{place}.{name}")


def _sources_in(value: object, place: str) -> Iterator[tuple[str, SourceConfig]]:
    if isinstance(value, SourceConfig):
        yield place, value
    if isinstance(value, BaseModel):
        yield from _sources(value, place)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _sources_in(item, f"{place}.{index}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _sources_in(item, f"{place}.{key}")


def _run_references(options: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings of the form ``run:<path>``: another run whose weights are read."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from _run_references(value, f"{prefix}{key}.")
    elif isinstance(options, str) and options.startswith("run:"):
        yield prefix.rstrip("."), options.removeprefix("run:")


def _source_digest(source: SourceConfig) -> str:
    if source.path is not None and any(letter in source.path for letter in "*?["):
        return content_digest(source)
    if source.path is not None:
        return _path_digest(Path(source.path), "dataset", source.revision)
    if source.source == "wordmath":
        return _folder_digest(PACKAGE / "data" / "wordmath")  # the generator itself is the content
    return _revision(source.source, "dataset", source.revision) if "/" in source.source else UNRESOLVED


def _model_digest(name: str, revision: str | None) -> str:
    if name == "embedded":
        return _folder_digest(PACKAGE / "models" / "embedded")
    if name.startswith("random:"):
        shape = Path(name.removeprefix("random:"))
        return _file_digest(shape) if shape.suffix == ".json" and shape.exists() else name
    return _path_digest(Path(name), "model", revision)


def _path_digest(path: Path, kind: str = "model", revision: str | None = None) -> str:
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        return _folder_digest(path)
    return _revision(str(path), kind, revision)


def _revision(repository: str, kind: str, revision: str | None) -> str:
    """The commit that the hub's local cache holds of a repository."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)
    reference = folder / "refs" / (revision or "main")
    if reference.is_file():
        return f"revision {reference.read_text().strip()}"
    return f"revision {revision}" if (folder / "snapshots" / str(revision)).is_dir() else UNRESOLVED


def _folder_digest(folder: Path) -> str:
    """Of every file below, by relative name; caches and compiled files are no content."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not {"__pycache__", ".cache", ".git"} & set(path.relative_to(folder).parts):
            content.update(f"{path.relative_to(folder)}\0{_file_digest(path)}\0".encode())
    return content.hexdigest()


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _known_digest(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _known_digest(path: Path, size: int, _modified: int, _inode: int) -> str:
    """Remembered while a process lives: a comparison asks for the same files at every run."""
    if size <= WHOLE_UP_TO:
        return digest(path)
    with path.open("rb") as file:
        return hashlib.sha256(file.read(HEADER) + str(size).encode()).hexdigest()


def require_same_defaults(directory: RunDirectory, recipe: Recipe) -> None:
    """A run's name leaves defaults out. Raises CheckpointError where one of a method has changed since it ran."""
    try:
        before = directory.recipe_content().get("methods") or {}
    except DamagedFile:
        return  # the folder's name says which recipe it is
    for name, options in recipe.methods.items():
        for key, value in options.items():
            old = (before.get(name) or {}).get(key, value)
            if old != value:
                raise CheckpointError(
                    f"{directory.path} ran with methods.{name}.{key}={old!r}, the default then; it is {value!r} now: "
                    f"write {key}: {old!r} in the recipe to mean that run, or run it again with --fresh"
                )
