"""From a source's configuration to normalised rows."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from headgate.errors import DataError

from . import wordmath
from .config import DataConfig, SourceConfig
from .contamination import check_disjoint
from .files import Located, find_file, read_file
from .readers import HUB, READERS, Row, field

WORDMATH_ROWS = {"train": 10_000, "validation": 500, "test": 500}
WORDMATH_OPTIONS = {"families", "difficulty", "redundancy", "count"}
OPTIONS = {"prompt_template", "validation_share", "sample_seed", "separator", "chunk_characters"}


def load_rows(config: SourceConfig) -> datasets.Dataset:
    """Normalised rows (see ``readers``) of one source and split.

    Raises DataError for an unknown source or option, a missing or empty file, a row without a needed field
    (file and line named) and a split that is empty after filtering.
    """
    allowed = OPTIONS | WORDMATH_OPTIONS if config.source == "wordmath" and not config.path else OPTIONS
    for option in config.options:
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(allowed))}"
            raise DataError(f"options.{option} is unknown for source '{config.source}': {hint}")
    reader = READERS.get(config.source) or READERS["auto"]
    rows: list[Row] = []
    for index, (raw, where) in enumerate(_raw_rows(config)):
        for part, row in enumerate(reader(raw, where, config)):
            rows.append({"example_id": _identity(raw, config, index, part), **row})
    rows = _select(rows, config)
    if not rows:
        raise DataError(
            f"split '{config.split}' of {_name(config)} is empty after filtering: check split and options"
        )
    columns = {name for row in rows for name in row}
    return datasets.Dataset.from_list([{name: row.get(name) for name in sorted(columns)} for row in rows])


def load_data(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and validation rows, disjoint.

    Where both come from the same file or the same split, a hash of each row gives 5% to validation
    (``options.validation_share`` says how much), so that neither run nor order moves a row across.
    """
    train, validation = config.train, config.validation
    if validation is not None and _same_rows(train, validation):
        share = train.options.get("validation_share", validation.options.get("validation_share", 0.05))
        train = train.model_copy(update={"options": {**train.options, "validation_share": share}})
        validation = validation.model_copy(
            update={"split": "validation", "options": {**validation.options, "validation_share": share}}
        )
    train_rows = load_rows(train)
    if validation is None:
        return train_rows, None
    validation_rows = load_rows(validation)
    check_disjoint(train_rows, validation_rows, overlap=config.overlap)
    return train_rows, validation_rows


def split_rows(rows: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, held out): a hash of what each row asks decides, so equal questions stay on one side."""
    held_out = [_fraction(row) < share for row in rows]
    train = [i for i, held in enumerate(held_out) if not held]
    other = [i for i, held in enumerate(held_out) if held]
    if not train or not other:
        raise DataError(
            f"{len(rows)} rows cannot be divided with validation_share={share}: give more rows or a split"
        )
    return rows.select(train), rows.select(other)


def _same_rows(train: SourceConfig, validation: SourceConfig) -> bool:
    if train.source != validation.source or train.path != validation.path:
        return False
    return (train.path is not None and Path(train.path).is_file()) or (
        train.split == validation.split and train.name == validation.name
    )


def _raw_rows(config: SourceConfig) -> Iterator[Located]:
    if config.path is not None and (Path(config.path).exists() or not _hub_like(config.path)):
        file = find_file(Path(config.path), config.split)
        official = config.source == "mbpp" and Path(config.path).is_file()
        return (item for item in read_file(file) if not official or _mbpp_split(*item) == config.split)
    if config.path is not None:
        return _hub(config.path, config)
    if config.source == "wordmath":
        return _wordmath(config)
    if config.source in HUB:
        path, name = HUB[config.source]
        return _hub(path, config.model_copy(update={"name": config.name or name}))
    if _hub_like(config.source):
        return _hub(config.source, config)
    if config.source in READERS:
        raise DataError(f"source '{config.source}' needs a path: a file, a folder or a hub data set's name")
    close = difflib.get_close_matches(config.source, READERS, n=1)
    hint = (
        f"did you mean '{close[0]}'?"
        if close
        else f"the sources are {', '.join(READERS)}, or owner/name on the hub"
    )
    raise DataError(f"unknown source '{config.source}': {hint}")


def _hub_like(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith(".") and not Path(text).suffix


def _wordmath(config: SourceConfig) -> Iterator[Located]:
    options = {key: value for key, value in config.options.items() if key in WORDMATH_OPTIONS - {"count"}}
    count = int(config.options.get("count") or config.limit or WORDMATH_ROWS.get(config.split, 500))
    for number, row in enumerate(
        wordmath.generate(config.split, count, seed=config.seed, **options), start=1
    ):
        yield row, f"wordmath {config.split} row {number}"


def _hub(path: str, config: SourceConfig) -> Iterator[Located]:
    try:
        rows = datasets.load_dataset(path, config.name, split=config.split, revision=config.revision)
    except Exception as error:  # the hub client raises anything from OSError to its own types
        raise DataError(
            f"data set '{path}' (name={config.name}, split={config.split}) cannot be loaded: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; give a local path if offline"
        ) from error
    for number, row in enumerate(rows):
        yield row, f"{path}[{config.split}] row {number}"


def _mbpp_split(raw: dict[str, Any], where: str) -> str:
    """The official division of the one-file MBPP by task id."""
    task = int(field(raw, where, "task_id"))
    return "prompt" if task <= 10 else "test" if task <= 510 else "validation" if task <= 600 else "train"


def _identity(raw: dict[str, Any], config: SourceConfig, index: int, part: int) -> str:
    own = next((raw[key] for key in ("example_id", "id", "task_id") if raw.get(key) is not None), None)
    stem = Path(config.path).name if config.path else config.source
    identity = str(own) if own is not None else f"{stem}[{config.split}]:{index}"
    return identity if part == 0 else f"{identity}.{part}"


def _select(rows: list[Row], config: SourceConfig) -> list[Row]:
    share = config.options.get("validation_share")
    if share is not None:
        held_out = config.split.split("[")[0] != "train"
        rows = [row for row in rows if (_fraction(row) < float(share)) is held_out]
    if config.limit is not None and len(rows) > config.limit:
        seed = config.options.get("sample_seed")
        if seed is None:
            return rows[: config.limit]
        rows = [rows[i] for i in sorted(random.Random(int(seed)).sample(range(len(rows)), config.limit))]
    return rows


def _fraction(row: Row) -> float:
    """A row's place in [0, 1), from what it asks and not from where it stands."""
    content = row.get("text") or row.get("prompt") or str(row.get("messages"))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=7).digest(), "big") / 2**56


def _name(config: SourceConfig) -> str:
    return f"'{config.path or config.source}'"
