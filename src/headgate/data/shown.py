"""Rows as they are trained, to look at: runs of tokens that are trained or masked, and what preparation counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets

from headgate.data.readers.base import Row

from .checks import local, sources_of
from .config import DataConfig, SourceConfig
from .preparation import prepare
from .report import DataReport
from .sources import load_rows
from .templates import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShownRow:
    """One token row. ``runs``: (text, whether it is trained), in order."""

    example_id: str
    runs: list[tuple[str, bool]]
    length: int
    trained: int
    truncated: bool


@dataclass(frozen=True)
class ShownSource:
    """A source's first rows and what preparing its rows counted."""

    key: str
    name: str
    share: float | None
    rows: list[ShownRow]
    report: DataReport


def shown_sources(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    limit: int | None,
    context_length: int | None,
) -> Iterator[ShownSource]:
    """Every source of a recipe: ``rows`` of its token rows, counted over the first ``limit`` rows (None: all)."""
    weights = [part.weight for part in config.train.mix]
    for key, source in sources_of(config):
        share = None
        if key.startswith("data.train.") and weights:
            share = weights[int(key.rsplit(".", 1)[1])] / sum(weights)
        yield _shown(key, source, share, config, tokenizer, rows, limit, context_length)


def _shown(
    key: str,
    source: SourceConfig,
    share: float | None,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    limit: int | None,
    context_length: int | None,
) -> ShownSource:
    if limit is not None:
        wanted = min(limit, source.limit or limit)
        source = source.model_copy(update={"limit": wanted, "streaming": not local(source)})
    loaded: datasets.Dataset = load_rows(source)
    prepared = prepare(loaded, tokenizer, config, context_length=context_length, packing=False)
    first = [_row(prepared.dataset[i], tokenizer, prepared.report.max_length) for i in range(min(count, len(prepared.dataset)))]  # fmt: skip
    return ShownSource(key, source.path or source.source, share, first, prepared.report)


def _row(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> ShownRow:
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"]):
        trained = label != IGNORED
        if not runs or runs[-1][1] is not trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    decode = tokenizer.backend_tokenizer.decode
    return ShownRow(
        str(row["example_id"]),
        [(decode(ids, skip_special_tokens=False), trained) for ids, trained in runs],
        row["length"],
        sum(label != IGNORED for label in row["labels"]),
        row["length"] == max_length,
    )
