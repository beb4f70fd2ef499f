"""From normalised rows to the data set a trainer reads, with an account of what was cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import datasets
import pyarrow

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from .config import DataConfig
from .mixing import Mixture
from .packing import pack
from .report import DataReport, column, padding_estimate, report_of
from .row_store import as_table, pyarrow_table
from .sources import MIX
from .token_store import BatchEncoder, check_sample, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Transform = Callable[[RawRow], object]
_BOOKKEEPING = ("row", "trained", "truncated")
__all__ = ["DataReport", "PreparedDataset", "effective_max_length", "padding_estimate", "prepare"]


@dataclass(frozen=True)
class PreparedDataset:
    dataset: datasets.Dataset
    report: DataReport


def effective_max_length(config: DataConfig, context_length: int | None) -> int:
    """``data.max_length``, or the model's context where that is shorter (with a warning)."""
    if context_length is not None and config.max_length > context_length:
        warnings.warn(
            f"data.max_length={config.max_length} exceeds the model's context of {context_length}: using {context_length}",
            stacklevel=3,
        )
        return context_length
    return config.max_length


def prepare(
    rows: Iterable[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    context_length: int | None = None,
    columns: Mapping[str, Transform] | None = None,
    packing: bool | None = None,
) -> PreparedDataset:
    """Tokenise every row; pack where asked. ``columns`` computes a method's extra columns from normalised rows.

    Rows of ``text`` longer than ``max_length`` go on in the next row, nothing is cut. Other rows are truncated on
    the right and counted. A row whose labels are all cut away is dropped and counted. A ``datasets.Dataset`` is
    tokenised once and kept on disk (see ``token_store``); other rows are tokenised in memory. Raises DataError naming
    the row whose prompt alone fills ``max_length`` (unless ``data.long_prompts`` is ``drop``) or whose trained tokens
    do not read as their source.
    """
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    encoder = BatchEncoder(
        tokenizer, effective_max_length(config, context_length), config.loss_on, config.long_prompts
    )
    packed = config.packing if packing is None else packing
    if isinstance(rows, datasets.Dataset) and MIX in rows.column_names and config.train.mix:
        return _mixture(rows, encoder, config, columns or {}, packed)
    return _prepare(rows, encoder, config, columns or {}, packed)


def _prepare(
    rows: Iterable[Mapping[str, object]],
    encoder: BatchEncoder,
    config: DataConfig,
    columns: Mapping[str, Transform],
    packed: bool,
) -> PreparedDataset:
    stored: datasets.Dataset
    if isinstance(rows, datasets.Dataset):
        stored = rows
        tokens, summary = tokens_of(stored, encoder)
    else:
        stored = datasets.Dataset(pyarrow_table(as_table([dict(row) for row in rows])))
        count = len(stored)
        summary = check_sample(stored, encoder) if count else {"checked": 0, "notes": []}
        made = encoder(stored.data.table, list(range(count))) if count else pyarrow.table({"row": []})
        tokens = datasets.Dataset(pyarrow_table(made))
    if not len(tokens):
        raise DataError("no row has a token to train on: check max_length, loss_on and the completions")
    report = report_of(tokens, len(stored), encoder.max_length, config.group_by_length, summary)
    for note in report.notes:
        warnings.warn(note, stacklevel=3)
    dataset = _with_columns(tokens, stored, columns)
    return PreparedDataset(pack(dataset, encoder.max_length) if packed else dataset, report)


def _with_columns(
    tokens: datasets.Dataset, rows: datasets.Dataset, columns: Mapping[str, Transform]
) -> datasets.Dataset:
    """Token rows with the methods' columns, which follow from the rows they were made of."""
    dataset = tokens.select_columns(
        [name for name in tokens.column_names if name not in _BOOKKEEPING and name not in columns]
    )
    if not columns:
        return dataset
    numbers = column(tokens, "row")
    made: dict[str, list[object]] = {name: [] for name in columns}
    last, values = -1, dict[str, object]()
    for number in numbers.tolist():
        if number != last:
            row = rows[number]
            last, values = number, {name: make(row) for name, make in columns.items()}
        for name, value in values.items():
            made[name].append(value)
    for name, list_of_values in made.items():
        dataset = dataset.add_column(name, list_of_values)
    return dataset


def _mixture(
    rows: datasets.Dataset,
    encoder: BatchEncoder,
    config: DataConfig,
    columns: Mapping[str, Transform],
    packed: bool,
) -> PreparedDataset:
    """Every source by itself, end to end; the trainer draws from them by weight (``mixing``)."""
    of_source = column(rows, MIX)
    parts = []
    for number in range(len(config.train.mix)):
        members = (of_source == number).nonzero()[0]
        part = rows.select(range(int(members[0]), int(members[-1]) + 1))
        parts.append(_prepare(part, encoder, config, columns, packed))
    mixture = Mixture(
        [part.weight for part in config.train.mix],
        [len(part.dataset) for part in parts],
        by_batch=config.mix_by == "batch",
    )
    dataset = datasets.concatenate_datasets(_shared_columns([part.dataset for part in parts]))
    dataset.mixture = mixture
    reports = [part.report for part in parts]
    histogram: dict[int, int] = {}
    for report in reports:
        for end, count in report.length_histogram.items():
            histogram[end] = histogram.get(end, 0) + count
    total = replace(
        reports[0],
        rows=sum(r.rows for r in reports),
        tokens=sum(r.tokens for r in reports),
        trained_tokens=sum(r.trained_tokens for r in reports),
        truncated=sum(r.truncated for r in reports),
        dropped=sum(r.dropped for r in reports),
        padding_estimate=sum(
            s * r.padding_estimate for s, r in zip(mixture.shares, reports)
        ),  # of batches from one source
        length_histogram=dict(sorted(histogram.items())),
        masks_checked=sum(r.masks_checked for r in reports),
        notes=sorted({note for r in reports for note in r.notes}),
        mix={
            f"{number + 1}:{part.path or part.source}": share
            for number, (part, share) in enumerate(zip(config.train.mix, mixture.shares))
        },
    )
    return PreparedDataset(dataset, total)


def _shared_columns(parts: list[datasets.Dataset]) -> list[datasets.Dataset]:
    """Parts with the columns that all of them have, of one type: what one source alone has is left out."""
    names = [
        name
        for name in parts[0].column_names
        if all(name in p.column_names and p.features[name] == parts[0].features[name] for p in parts)
    ]
    return [part.select_columns(names) for part in parts]
