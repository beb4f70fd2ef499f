"""Columns under the names that a reader expects, and the rows that a filter keeps."""

from __future__ import annotations

import difflib
import string as strings
from collections.abc import Mapping

from headgate.errors import DataError

from .config import SourceConfig


def mapped(raw: Mapping[str, object], where: str, config: SourceConfig) -> Mapping[str, object]:
    """The row with ``config.columns`` applied: each new name holds a column's value, or a filled template."""
    if not config.columns:
        return raw
    row = {name: value for name, value in raw.items() if name not in config.columns.values()}
    for new, old in config.columns.items():
        if "{" in old:
            row[new] = _filled(old, raw, where, new)
        else:
            row[new] = raw[column(raw, old, where, f"columns.{new}")]
    return row


def kept(raw: Mapping[str, object], where: str, config: SourceConfig) -> bool:
    """Whether ``config.filter`` lets the row through."""
    for name, wanted in config.filter.items():
        value = raw[column(raw, name, where, "filter")]
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if value not in allowed and str(value) not in map(str, allowed):
            return False
    return True


def column(raw: Mapping[str, object], name: str, where: str, key: str) -> str:
    """``name`` where the row has it. Raises DataError naming the place, the columns and the likely one."""
    if name in raw:
        return name
    close = difflib.get_close_matches(name, [str(other) for other in raw], n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"the row has: {', '.join(map(str, raw)) or 'nothing'}"
    raise DataError(f"{where}: {key} asks for column '{name}', which is not there: {hint}")


def _filled(template: str, raw: Mapping[str, object], where: str, new: str) -> str:
    try:
        names = [name for _, name, _, _ in strings.Formatter().parse(template) if name]
    except ValueError as error:
        raise DataError(f"columns.{new}: {template!r} is no template ({error}): double braces that are text") from error  # fmt: skip
    for name in names:
        column(raw, name.split(".")[0].split("[")[0], where, f"columns.{new}")
    return template.format(**raw)
