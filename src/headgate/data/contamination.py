"""Splits must be disjoint: a problem that stands in two of them is found by a hash of its normalised text."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headgate.errors import DataError


@dataclass(frozen=True)
class OverlapReport:
    """How many rows of the other split ask what a training row asks, with a few of their ids."""

    rows: int
    shared: int
    examples: tuple[str, ...]


def fingerprint(row: Mapping[str, Any]) -> str:
    """Hash of what a row asks: letters and digits only, lower case."""
    content = row.get("prompt") or row.get("text")
    if content is None:
        content = " ".join(turn["content"] for turn in row["messages"] if turn["role"] == "user")
    normal = re.sub(r"[\W_]+", " ", content.lower()).strip()
    return hashlib.blake2b(normal.encode(), digest_size=16).hexdigest()


def check_disjoint(
    train: Iterable[Mapping[str, Any]],
    other: Iterable[Mapping[str, Any]],
    *,
    overlap: Literal["error", "warn"] = "error",
    name: str = "validation",
) -> OverlapReport:
    """Raises DataError (or warns) where a row of ``other`` asks exactly what a row of ``train`` asks."""
    seen = {fingerprint(row) for row in train}
    rows, shared = 0, []
    for row in other:
        rows += 1
        if fingerprint(row) in seen:
            shared.append(str(row["example_id"]))
    report = OverlapReport(rows, len(shared), tuple(shared[:5]))
    if shared:
        message = (
            f"{len(shared)} of {rows} {name} rows also stand in the training data ({', '.join(shared[:5])}): take "
            "another split, set options.validation_share, or accept it with data.overlap: warn"
        )
        if overlap == "error":
            raise DataError(message)
        warnings.warn(message, stacklevel=2)
    return report
