"""Splits must be disjoint: a problem that stands in two of them is found by a hash of its normalised text."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from .cache import code_version, digest, entry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Overlap = Literal["error", "warn"]


@dataclass(frozen=True)
class OverlapReport:
    """How many rows of the other split ask what a training row asks, with a few of their ids."""

    rows: int
    shared: int
    examples: tuple[str, ...]


def asked(row: RawRow) -> str:
    """What a row asks: its prompt, text or user turns; what it answers where that is empty."""
    if row.get("messages") is not None:
        users = [str(turn.get("content") or "") for turn in row["messages"] if turn["role"] == "user"]
        return " ".join(users) or str(row["messages"])
    return str(row.get("prompt") or row.get("text") or row.get("completion") or "")


def fingerprint(row: Mapping[str, object]) -> str:
    """Hash of what a row asks: letters and digits only, lower case; as it stands where it has neither."""
    content = asked(row)
    normal = re.sub(r"[\W_]+", " ", content.lower()).strip()
    return hashlib.blake2b((normal or content).encode(), digest_size=16).hexdigest()


def check_disjoint(
    train: Iterable[RawRow],
    other: Iterable[RawRow],
    *,
    overlap: Overlap = "error",
    name: str = "validation",
) -> OverlapReport:
    """Raises DataError (or warns) where a row of ``other`` asks exactly what a row of ``train`` asks."""
    import datasets

    if isinstance(train, datasets.Dataset) and isinstance(other, datasets.Dataset):
        key = digest("overlap", train._fingerprint, other._fingerprint, code_version())
        _, kept = entry("overlap", key, lambda _folder: asdict(_overlap(train, other)))
        report = OverlapReport(kept["rows"], kept["shared"], tuple(kept["examples"]))
    else:
        report = _overlap(train, other)
    if report.shared:
        message = (
            f"{report.shared} of {report.rows} {name} rows also stand in the training data "
            f"({', '.join(report.examples)}): take another split, set options.validation_share, or accept it with "
            "data.overlap: warn"
        )
        if overlap == "error":
            raise DataError(message)
        warnings.warn(message, stacklevel=2)
    return report


def _overlap(train: Iterable[Mapping[str, object]], other: Iterable[Mapping[str, object]]) -> OverlapReport:
    import numpy

    known = numpy.unique(_hashes(train))
    rows = list(_hashes(other))
    shared = numpy.flatnonzero(numpy.isin(numpy.asarray(rows, dtype=numpy.uint64), known))
    examples: list[str] = []
    wanted = set(shared[:5].tolist())
    for index, row in enumerate(other if wanted else ()):
        if index in wanted:
            examples.append(str(row["example_id"]))
        if len(examples) == len(wanted):
            break
    return OverlapReport(len(rows), len(shared), tuple(examples))


def _hashes(rows: Iterable[Mapping[str, object]]) -> npt.NDArray[np.uint64]:
    """64 bits of every row's fingerprint: two rows in a million that differ agree with a chance of 1e-7."""
    import numpy

    return numpy.fromiter((int(fingerprint(row)[:16], 16) for row in _asking(rows)), dtype=numpy.uint64)


def _asking(rows: Iterable[Mapping[str, object]]) -> Iterable[Mapping[str, object]]:
    """Only the columns that say what is asked: the others need not be decoded."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        return rows
    wanted = [name for name in ("messages", "prompt", "text", "completion") if name in rows.column_names]
    chosen: Iterable[RawRow] = rows.select_columns(wanted)
    return chosen
