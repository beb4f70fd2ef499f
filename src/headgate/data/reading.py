"""From a source's configuration to normalised rows as they are read: what a check of the first rows needs.

``datasets`` is imported for hub data alone, and nothing of a model: rows are looked at before either is there.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from headgate.errors import DataError

from . import wordmath
from .columns import kept, mapped
from .config import SourceConfig
from .contamination import asked
from .files import base_split, find_files, slices_apart, split_slice
from .formats import Located, read_files
from .identity import hub_like, hub_place
from .readers import Row, source_named
from .readers.catalogue import unknown_source
from .readers.programs import mbpp_split

WORDMATH_ROWS = {"train": 10_000, "validation": 500, "test": 500}
WORDMATH_OPTIONS = {"families", "difficulty", "redundancy", "count"}
OPTIONS = {"prompt_template", "validation_share", "sample_seed"}
TEXT_OPTIONS = {"separator", "chunk_characters"}


def iterate(config: SourceConfig) -> Iterator[Row]:
    """Normalised rows as they are read, filtered and limited, each with its ``example_id``."""
    source = source_named(config.source) or source_named("auto")
    assert source is not None
    share = config.options.get("validation_share")
    held_out = base_split(config.split) != "train"
    rows = (
        {"example_id": _identity(raw, config, index, part), **row}
        for index, (raw, where) in enumerate(_raw_rows(config))
        if kept(raw, where, config)
        for part, row in enumerate(source.reader(mapped(raw, where, config), where, config))
    )
    if share is not None:
        rows = (row for row in rows if (fraction(row) < float(share)) is held_out)
    return islice(rows, config.limit) if config.limit is not None else rows


def check_source(config: SourceConfig) -> None:
    """Raise DataError for a source or option that does not exist, and for a source without its path."""
    if source_named(config.source) is None and not (config.path is None and hub_like(config.source)):
        raise unknown_source(config.source)
    allowed = OPTIONS | TEXT_OPTIONS
    if config.source == "wordmath" and not config.path:
        allowed = OPTIONS | WORDMATH_OPTIONS
    for option in config.options:
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(allowed))}"
            raise DataError(f"options.{option} is unknown for source '{config.source}': {hint}")
    chunk = config.options.get("chunk_characters")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise DataError(f"options.chunk_characters={chunk!r}: give a number of characters, or leave documents whole")  # fmt: skip
    if config.path is None and config.source != "wordmath" and hub_place(config) is None:
        raise DataError(
            f"source '{config.source}' needs a path: a file, a glob, a folder or a hub data set's name"
        )


def divided(train: SourceConfig, validation: SourceConfig | None) -> tuple[SourceConfig, SourceConfig | None]:
    """The two sources, with a share of the rows held out where they name the same rows."""
    if validation is None:
        return train, None
    share = validation.options.get("validation_share")
    parts: list[SourceConfig] = []
    sources: list[SourceConfig] = [*train.mix] or [train]
    for part in sources:
        if _same_rows(part, validation):
            share = part.options.get("validation_share", 0.05 if share is None else share)
            part = part.model_copy(update={"options": {**part.options, "validation_share": share}})
            options = {**validation.options, "validation_share": share}
            validation = validation.model_copy(update={"split": _held_out(validation.split), "options": options})  # fmt: skip
        parts.append(part)
    return (train.model_copy(update={"mix": parts}) if train.mix else parts[0]), validation


def _held_out(split: str) -> str:
    """``validation``, with the slice that was asked for."""
    return split if base_split(split) != "train" else split.replace("train", "validation", 1)


def _same_rows(train: SourceConfig, validation: SourceConfig) -> bool:
    if train.source != validation.source or train.path != validation.path:
        return False
    if slices_apart(train.split, validation.split):
        return False
    if train.path is not None and (Path(train.path).is_file() or "*" in train.path):
        return True
    if train.path is not None and (Path(train.path) / "state.json").exists():
        return True
    return train.split == validation.split and train.name == validation.name


def _raw_rows(config: SourceConfig) -> Iterator[Located]:
    if config.path is not None and (Path(config.path).expanduser().exists() or not hub_like(config.path)):
        found = find_files(config.path, config.split, config.name)
        rows = read_files(found)
        if config.source == "mbpp" and Path(config.path).is_file():
            rows = (item for item in rows if mbpp_split(*item) == base_split(config.split))
        part = split_slice(config.split)
        return rows if part == slice(None) else islice(rows, part.start, part.stop)
    place = hub_place(config)
    return _wordmath(config) if place is None else _hub(*place, config)


def _wordmath(config: SourceConfig) -> Iterator[Located]:
    options = {key: value for key, value in config.options.items() if key in WORDMATH_OPTIONS - {"count"}}
    count = int(config.options.get("count") or config.limit or WORDMATH_ROWS.get(config.split, 500))
    for number, row in enumerate(
        wordmath.generate(config.split, count, seed=config.seed, **options), start=1
    ):
        yield row, f"wordmath {config.split} row {number}"


def _hub(path: str, name: str | None, config: SourceConfig) -> Iterator[Located]:
    import datasets

    try:
        rows = datasets.load_dataset(
            path, name, split=config.split, revision=config.revision, streaming=config.streaming
        )
    except Exception as error:  # the hub client raises anything from OSError to its own types
        raise DataError(
            f"data set '{path}' (name={name}, split={config.split}) cannot be loaded: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; give a local path if offline"
        ) from error
    for number, row in enumerate(rows):
        yield dict(row), f"{path}[{config.split}] row {number}"


def _identity(raw: dict[str, object], config: SourceConfig, index: int, part: int) -> str:
    own = next((raw[key] for key in ("example_id", "id", "task_id") if raw.get(key) is not None), None)
    stem = Path(config.path).name if config.path else config.source
    identity = str(own) if own is not None else f"{stem}[{config.split}]:{index}"
    return identity if part == 0 else f"{identity}.{part}"


def fraction(row: Row) -> float:
    """A row's place in [0, 1), from what it asks and not from where it stands."""
    content = asked(row) if row.get("messages") is None else str(row["messages"])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=7).digest(), "big") / 2**56
