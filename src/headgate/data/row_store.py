"""Normalised rows on disk: written in batches as they are read, mapped into memory when they are used.

Conversations and tools are stored as JSON (``datasets.Json``), because as Arrow structs every tool call would get
the arguments of all the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow

from headgate.errors import DataError

from .readers import Row

BATCH = 2000
JSON_COLUMNS = ("messages", "tools")


def write_rows(rows: Iterable[Row], folder: Path) -> int:
    """Every row as Arrow stream files, a new one where a batch has other columns. Returns how many rows."""
    count = part = 0
    writer: _Stream | None = None
    held: list[Row] = []

    def flush() -> None:
        nonlocal writer, part
        table = as_table(held)
        if writer is not None and not writer.schema.equals(table.schema):
            try:
                table = _conformed(table, writer.schema)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, ValueError):
                writer.close()
                writer = None
        if writer is None:
            writer = _Stream(folder / f"rows-{part:05d}.arrow", table.schema)
            part += 1
        writer.write(table)
        held.clear()

    for row in rows:
        held.append(row)
        count += 1
        if len(held) == BATCH:
            flush()
    if held:
        flush()
    if writer is not None:
        writer.close()
    return count


def read_rows(folder: Path, fingerprint: str) -> datasets.Dataset:
    """The rows that ``write_rows`` wrote, mapped into memory."""
    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("rows-*.arrow"))]
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(_alike(parts))
    return with_fingerprint(rows, fingerprint)


def with_fingerprint(rows: datasets.Dataset, fingerprint: str) -> datasets.Dataset:
    """The data set under a name of its content, from which ``datasets`` derives those of its selections."""
    rows._fingerprint = fingerprint
    return rows


def as_table(rows: list[Row]) -> pyarrow.Table:
    """Rows as an Arrow table with the columns of all of them in alphabetical order."""
    columns = sorted({name for row in rows for name in row})
    arrays = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        if name in JSON_COLUMNS:
            texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
            arrays[name] = pyarrow.ExtensionArray.from_storage(
                pyarrow.json_(), pyarrow.array(texts, pyarrow.string())
            )
            continue
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(f"column '{name}' mixes types that cannot stand together: {error}") from error
    return pyarrow.table(arrays)


def _conformed(table: pyarrow.Table, schema: pyarrow.Schema) -> pyarrow.Table:
    """The table with the columns of ``schema``: absent ones null, all-null ones cast."""
    if not set(table.column_names) <= set(schema.names):
        raise ValueError("a new column")
    columns = []
    for field in schema:
        if field.name in table.column_names:
            column = table[field.name]
            columns.append(column if column.type.equals(field.type) else column.cast(field.type))
        else:
            columns.append(pyarrow.nulls(len(table), field.type))
    return pyarrow.table(columns, schema=schema)


def _alike(parts: list[datasets.Dataset]) -> list[datasets.Dataset]:
    """Parts of one schema: where one has no value of a column, the type is the others'."""
    schema = pyarrow.unify_schemas(
        [part.data.table.schema.remove_metadata() for part in parts], promote_options="permissive"
    )
    return [datasets.Dataset(pyarrow_table(_conformed(part.data.table, schema))) for part in parts]


def pyarrow_table(table: pyarrow.Table) -> object:
    """A table in memory as ``datasets`` holds it."""
    return datasets.table.InMemoryTable(table)


class _Stream:
    """An Arrow stream file, written batch by batch."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        self.schema = schema
        self.file = pyarrow.OSFile(str(path), "wb")
        self.stream = pyarrow.ipc.new_stream(self.file, schema)

    def write(self, table: pyarrow.Table) -> None:
        self.stream.write_table(table)

    def close(self) -> None:
        self.stream.close()
        self.file.close()


def json_value(value: object) -> object:
    """A JSON column's value, whether Arrow or ``datasets`` gave it."""
    return json.loads(value) if isinstance(value, str) else value


def plain_rows(table: pyarrow.Table) -> Iterator[Row]:
    """Rows of an Arrow table as ``datasets`` would give them."""
    for row in table.to_pylist():
        for name in JSON_COLUMNS:
            if name in row:
                row[name] = json_value(row[name])
        yield row
