"""Local files as raw rows, one after the other, each with its place: JSON lines, JSON, CSV, TSV, parquet, Arrow, text.

Rows are streamed: a file of any size takes the memory of one batch (a JSON list and a text file are read whole).
JSON and CSV are parsed here and not by the ``datasets`` builders, which name no line of a faulty file and write a
second copy of it; parquet and Arrow go through pyarrow, saved data sets through ``datasets``, each imported where it is
needed: a second that lines of JSON do not wait for.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from headgate.data.readers.base import Row
from headgate.errors import DataError

from .files import DataFiles, kind_of

Located = tuple[Row, str]  # a raw row and its place, "file:line"
BATCH = 1000
csv.field_size_limit(sys.maxsize)


def read_files(found: DataFiles) -> Iterator[Located]:
    """Raw rows of all files in order. Raises DataError naming file and line, and for a file without rows."""
    if found.saved is not None:
        yield from _saved(found.saved)
    for path in found.files:
        yield from read_file(path)


def read_file(path: Path) -> Iterator[Located]:
    """Raw rows of one file. A text file is one row ``{"text": <whole file>}``."""
    empty = True
    try:
        for row, place in _READ[kind_of(path) or "text"](path):
            empty = False
            yield row, f"{path}{place}"
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"data file '{path}' cannot be read as UTF-8 text: {error}") from error
    if empty:
        raise DataError(f"data file '{path}' is empty")


def _open(path: Path) -> AbstractContextManager[IO[str]]:
    import fsspec

    opened: AbstractContextManager[IO[str]] = fsspec.open(
        str(path), "rt", compression="infer", encoding="utf-8-sig", newline="", block_size=1 << 20
    )
    return opened


def _json_lines(path: Path) -> Iterator[Located]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                table = number == 1 and "{" not in line and any(sign in line for sign in ",;\t")
                hint = ": if it is a table, name it .csv or .tsv" if table else ""
                raise DataError(
                    f"{path}:{number}: not JSON ({error.msg} at column {error.colno}){hint}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a JSON object is needed, not {type(row).__name__}")
            yield row, f":{number}"


def _json(path: Path) -> Iterator[Located]:
    """A list of rows, an object that holds one list, or lines of JSON under the name ``.json``."""
    with _open(path) as file:
        beginning = file.readline()
    if beginning.lstrip().startswith("{") and _is_json(beginning):
        yield from _json_lines(path)
        return
    with _open(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(f"{path}: a JSON list of rows (or an object holding one list) is needed")
        content = lists[0]
    if not isinstance(content, list):
        raise DataError(f"{path}: a JSON list of rows is needed, not {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {type(row).__name__}, a JSON object is needed")
        yield row, f": row {number}"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _table(delimiter: str) -> Callable[[Path], Iterator[Located]]:
    def read(path: Path) -> Iterator[Located]:
        with _open(path) as file:
            reader = csv.DictReader(file, delimiter=delimiter, restkey="")
            for row in reader:
                if row.get(""):
                    raise DataError(
                        f"{path}:{reader.line_num}: more values than the header's {len(reader.fieldnames or [])} columns: "
                        "quote values that hold the delimiter"
                    )
                yield {str(k): v for k, v in row.items() if k}, f":{reader.line_num}"

    return read


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f": row {number}"
    except pyarrow.ArrowException as error:
        raise DataError(f"data file '{path}' is no readable parquet file: {error}") from error


def _arrow(path: Path) -> Iterator[Located]:
    """Arrow IPC, as a stream (what ``datasets`` writes) or as a file."""
    import pyarrow

    number = 0
    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            try:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid as error:
                raise DataError(f"data file '{path}' is no readable Arrow file: {error}") from error
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield row, f": row {number}"


def _saved(path: Path) -> Iterator[Located]:
    """A folder that ``save_to_disk`` wrote, its index mapping and column types honoured."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever is torn inside
        raise DataError(f"saved data set '{path}' cannot be read: {str(error).splitlines()[0]}") from error
    if not len(loaded):
        raise DataError(f"saved data set '{path}' is empty")
    for number, row in enumerate(loaded, start=1):
        yield dict(row), f"{path}: row {number}"


def _text(path: Path) -> Iterator[Located]:
    with _open(path) as file:
        content = file.read()
    if content.strip():
        yield {"text": content}, ""


_READ = {
    "jsonl": _json_lines, "json": _json, "csv": _table(","), "tsv": _table("\t"), "parquet": _parquet,
    "arrow": _arrow, "text": _text,
}  # fmt: skip
