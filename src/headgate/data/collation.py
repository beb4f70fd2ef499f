"""Rows to right-padded tensors; packed rows keep their restarted positions and carry no attention mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from .templates import IGNORED


class Collator:
    """Callable for a DataLoader.

    Plain rows give ``input_ids``, ``attention_mask``, ``labels`` of shape ``[B, T]``. Packed rows give
    ``input_ids``, ``position_ids``, ``labels``, ``segment_ids``: a pad token there has segment -1, label -100 and
    position 0, which makes it a document of its own that nothing attends to.

    Args:
        pad_token_id: the tokenizer's pad id.
        columns: extra columns that methods ask for: integers become ``[B]`` or ``[B, k]`` tensors (packed: one
            list entry per document, left as lists), strings stay lists.
        column_owners: column -> method name, for the message when a column is missing.
        pad_to_multiple_of: round T up to a multiple.
    """

    def __init__(
        self,
        pad_token_id: int,
        columns: Sequence[str] = (),
        *,
        column_owners: Mapping[str, str] | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.columns = tuple(columns)
        self.column_owners = dict(column_owners or {})
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[RawRow]) -> dict[str, object]:
        width = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, object] = {
            "input_ids": _pad([row["input_ids"] for row in rows], width, self.pad_token_id),
            "labels": _pad([row["labels"] for row in rows], width, IGNORED),
        }
        packed = "segment_ids" in rows[0]
        if packed:
            batch["position_ids"] = _pad([row["position_ids"] for row in rows], width, 0)
            batch["segment_ids"] = _pad([row["segment_ids"] for row in rows], width, -1)
        else:
            batch["attention_mask"] = _pad([[1] * len(row["input_ids"]) for row in rows], width, 0)
        for name in self.columns:
            if name not in batch:
                batch[name] = self._column(name, rows, packed)
        return batch

    def _column(self, name: str, rows: Sequence[RawRow], packed: bool) -> object:
        missing = [row for row in rows if row.get(name) is None]
        if missing:
            owner = self.column_owners.get(name)
            needed = f"method '{owner}' needs" if owner else "the batch needs"
            raise DataError(
                f"{needed} column '{name}', which the data set does not have "
                f"(it has: {', '.join(map(str, rows[0]))}): add it, or use headgate.data.preparation(columns=...)"
            )
        values = [row[name] for row in rows]
        first = values[0][0] if isinstance(values[0], list) and values[0] else values[0]
        if packed or not isinstance(first, (int, float)):
            return values
        if isinstance(values[0], list) and len({len(value) for value in values}) > 1:
            return values
        return torch.tensor(values)


def _pad(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded
