"""Normalised rows of a source, read once and kept by content; training and validation rows, disjoint."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import numpy

from headgate.errors import DataError

from .cache import code_version, digest, entry
from .config import DataConfig, SourceConfig
from .contamination import check_disjoint
from .identity import content_digest
from .reading import check_source, divided, fraction, iterate
from .row_store import read_rows, with_fingerprint, write_rows

MIX = "mix"
"""Of a mixture's rows: the number of the source they came from."""


def load_rows(config: SourceConfig) -> datasets.Dataset:
    """Normalised rows (see ``readers``) of one source and split, mapped from the cache where they were read before.

    Rows of a mixture stand source after source, with their source's number in column ``mix``. Raises DataError
    for an unknown source or option, a missing or empty file, a row without a needed field (file and line named)
    and a split that is empty after filtering.
    """
    if config.mix:
        parts = [load_rows(part) for part in config.mix]
        numbered = [
            part.add_column(MIX, numpy.full(len(part), number, dtype=numpy.int32))
            for number, part in enumerate(parts)
        ]
        together = datasets.concatenate_datasets(numbered)
        return with_fingerprint(together, digest("mix", [part._fingerprint for part in parts]))
    check_source(config)
    seed = config.options.get("sample_seed")
    reading = config if seed is None else config.model_copy(update={"limit": None})
    key = digest(content_digest(config), reading.model_dump(mode="json"), code_version())

    def fill(folder: Path) -> dict[str, object]:
        count = write_rows(iterate(reading), folder)
        if not count:
            raise DataError(_empty(config))
        return {"rows": count}

    folder, _ = entry("rows", key, fill)
    rows = read_rows(folder, key)
    if seed is not None and config.limit is not None and len(rows) > config.limit:
        chosen = sorted(random.Random(int(seed)).sample(range(len(rows)), config.limit))
        rows = with_fingerprint(rows.select(chosen), digest(key, config.limit, seed))
    return rows


def load_data(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and validation rows, disjoint.

    Where both come from the same file or the same split, a hash of each row gives 5% to validation
    (``options.validation_share`` says how much), so that neither run nor order moves a row across. Two slices of one
    split that share no row, as ``train[:1000]`` and ``train[1000:1200]``, are taken as they are written.
    """
    train, validation = divided(config.train, config.validation)
    train_rows = load_rows(train)
    if validation is None:
        return train_rows, None
    validation_rows = load_rows(validation)
    check_disjoint(train_rows, validation_rows, overlap=config.overlap)
    return train_rows, validation_rows


def split_rows(rows: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, held out): a hash of what each row asks decides, so equal questions stay on one side."""
    held_out = [fraction(row) < share for row in rows]
    train = [i for i, held in enumerate(held_out) if not held]
    other = [i for i, held in enumerate(held_out) if held]
    if not train or not other:
        raise DataError(
            f"{len(rows)} rows cannot be divided with validation_share={share}: give more rows or a split"
        )
    return rows.select(train), rows.select(other)


def _empty(config: SourceConfig) -> str:
    place = f"'{config.path or config.source}'"
    advice = "check split and options"
    if config.options.get("validation_share") is not None:
        advice += (
            "; where a file is one document, it cannot be held out in part: options.chunk_characters divides it, "
            "or give another file"
        )
    if config.filter:
        advice = f"no row has {config.filter}"
    return f"split '{config.split}' of {place} is empty after filtering: {advice}"
