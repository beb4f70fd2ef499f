"""Local files as raw rows, each with the place it came from: JSONL, JSON, parquet, CSV, text, all also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headgate.errors import DataError

Located = tuple[dict[str, Any], str]  # a raw row and its place, "file:line"
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz", ".csv.gz")


def find_file(path: Path, split: str) -> Path:
    """``path`` itself, or ``<split>.<suffix>`` in a folder. Raises DataError where there is none."""
    if path.is_file():
        return path
    if not path.exists():
        raise DataError(f"data path '{path}' does not exist: give a file, a folder or a hub data set's name")
    base = split.split("[")[0]
    aliases = {"validation": ["validation", "valid", "val", "dev"]}.get(base, [base])
    for stem in aliases:
        for suffix in SUFFIXES:
            if (path / (stem + suffix)).is_file():
                return path / (stem + suffix)
    found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
    raise DataError(
        f"folder '{path}' has no file for split '{base}' (looked for {base}.jsonl, .json, ...; found {found})"
    )


def read_file(path: Path) -> Iterator[Located]:
    """Raw rows of one file. Text files are one row ``{"text": <whole file>}``. Raises DataError naming file and line."""
    kind = next((s for s in path.suffixes[::-1] if s != ".gz"), "")
    if kind == ".parquet":
        yield from _parquet(path)
        return
    text = _text(path)
    if not text.strip():
        raise DataError(f"data file '{path}' is empty")
    if kind == ".jsonl" or (kind == ".json" and not text.lstrip().startswith(("[", "{\n", "{\r"))):
        yield from _json_lines(path, text)
    elif kind == ".json":
        yield from _json(path, text)
    elif kind == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
            yield dict(row), f"{path}:{number}"
    else:
        yield {"text": text}, str(path)


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"data file '{path}' cannot be read as UTF-8 text: {error}") from error


def _json_lines(path: Path, text: str) -> Iterator[Located]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a JSON object is needed, not {type(row).__name__}")
        yield row, f"{path}:{number}"


def _json(path: Path, text: str) -> Iterator[Located]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(f"{path}: a JSON list of rows (or an object holding one list) is needed")
        content = lists[0]
    if not content:
        raise DataError(f"data file '{path}' is empty: its list has no rows")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {type(row).__name__}, a JSON object is needed")
        yield row, f"{path}: row {number}"


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"data file '{path}' is no readable parquet file: {error}") from error
    if not rows:
        raise DataError(f"data file '{path}' is empty")
    for number, row in enumerate(rows, start=1):
        yield row, f"{path}: row {number}"
