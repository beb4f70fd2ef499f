"""From normalised rows to the data set a trainer reads, with an account of what was cut."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import datasets

from headgate.errors import DataError

from .config import DataConfig
from .packing import pack
from .templates import IGNORED, PromptTooLong, encode

Transform = Callable[[Mapping[str, Any]], Any]
_INTERNAL = {"prompt", "completion", "messages", "text"}


@dataclass(frozen=True)
class DataReport:
    """What preparation did. ``padding_estimate`` is the share of pad tokens that batches of 8 would have."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped: int
    max_length: int
    padding_estimate: float
    length_histogram: dict[int, int]
    """Number of rows by length, in bins of 64 tokens named by their upper end."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        cut = f", {self.truncated} truncated to {self.max_length}" if self.truncated else ""
        dropped = f", {self.dropped} dropped (no completion within it)" if self.dropped else ""
        return (
            f"{self.rows} rows, {self.tokens} tokens{cut}{dropped}, padding about {self.padding_estimate:.0%}"
        )


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
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    config: DataConfig,
    *,
    context_length: int | None = None,
    columns: Mapping[str, Transform] | None = None,
    packing: bool | None = None,
) -> PreparedDataset:
    """Tokenise every row; pack where asked. ``columns`` computes a method's extra columns from normalised rows.

    Rows of ``text`` longer than ``max_length`` go on in the next row, nothing is cut. Other rows are truncated on
    the right and counted. A row whose labels are all cut away is dropped and counted. Raises DataError naming the
    row whose prompt alone fills ``max_length``, unless ``data.long_prompts`` is ``drop``.
    """
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    max_length = effective_max_length(config, context_length)
    encoded: list[dict[str, Any]] = []
    truncated = dropped = 0
    for row in rows:
        extra = {name: make(row) for name, make in (columns or {}).items()}
        kept = {name: value for name, value in row.items() if name not in _INTERNAL and name not in extra}
        try:
            pieces = _pieces(row, tokenizer, max_length, config.loss_on)
        except PromptTooLong:
            if config.long_prompts == "error":
                raise
            dropped += 1
            continue
        for piece in pieces:
            truncated += piece.pop("truncated")
            if all(label == IGNORED for label in piece["labels"]):
                dropped += 1
                continue
            encoded.append({**kept, **extra, **piece})
    if not encoded:
        raise DataError("no row has a token to train on: check max_length, loss_on and the completions")
    lengths = [row["length"] for row in encoded]
    report = DataReport(
        rows=len(encoded),
        tokens=sum(lengths),
        trained_tokens=sum(sum(label != IGNORED for label in row["labels"]) for row in encoded),
        truncated=truncated,
        dropped=dropped,
        max_length=max_length,
        padding_estimate=padding_estimate(lengths, 8, config.group_by_length),
        length_histogram=dict(sorted(Counter(-(-length // 64) * 64 for length in lengths).items())),
    )
    if packing if packing is not None else config.packing:
        return PreparedDataset(pack(encoded, max_length), report)
    return PreparedDataset(datasets.Dataset.from_list(encoded), report)


def padding_estimate(lengths: list[int], batch_size: int, grouped: bool) -> float:
    """Share of pad tokens in right-padded batches of shuffled (or length-grouped) rows."""
    order = sorted(lengths) if grouped else random.Random(0).sample(lengths, len(lengths))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def _pieces(row: Mapping[str, Any], tokenizer: Any, max_length: int, loss_on: str) -> list[dict[str, Any]]:
    if row.get("text") is None:
        return [encode(row, tokenizer, max_length, loss_on)]
    whole = encode(row, tokenizer, None, loss_on)
    pieces = []
    for start in range(0, whole["length"], max_length):
        ids, labels = (whole[name][start : start + max_length] for name in ("input_ids", "labels"))
        pieces.append(
            {"input_ids": ids, "labels": labels, "length": len(ids), "prompt_length": 0, "truncated": False}
        )
    if len(pieces) > 1 and pieces[-1]["length"] < 2:  # a lone token has no successor to predict
        pieces.pop()
    return pieces
