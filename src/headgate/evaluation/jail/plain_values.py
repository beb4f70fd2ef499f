"""Values between the solution and the judge: plain ones by copy, everything else by reference.

What crosses is data. The judge builds each value itself, of exactly a built-in type, so nothing that the solution
defined (an ``__eq__`` that is always true) takes part in a comparison. An instance of a subclass crosses as its
plain base; a NumPy scalar as the number; any other object as a number that only its owner can resolve.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import struct
from collections.abc import Callable
from typing import Any

LONGEST = 16 << 20  # bytes of one message
TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        list,
        tuple,
        set,
        frozenset,
        dict,
        range,
        object,
    )
}
CONTAINERS: dict[str, Any] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque,
}  # fmt: skip
MAPPINGS: dict[str, type] = {
    "dict": dict, "Counter": collections.Counter, "OrderedDict": collections.OrderedDict,
}  # fmt: skip
WRITTEN: dict[str, tuple[str, Callable[[Any], Any], str]] = {  # name: module, what is written, what reads it
    "Decimal": ("decimal", str, "Decimal"),
    "Fraction": ("fractions", str, "Fraction"),
    "datetime": ("datetime", lambda value: value.isoformat(), "datetime.fromisoformat"),
    "date": ("datetime", lambda value: value.isoformat(), "date.fromisoformat"),
    "time": ("datetime", lambda value: value.isoformat(), "time.fromisoformat"),
    "timedelta": ("datetime", lambda value: value // type(value)(microseconds=1), "timedelta"),
}
LARGE = 1 << 53


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """``value`` as JSON can hold it; ``refer`` gives the number of an object that is not plain."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int.__index__(value) if -LARGE < value < LARGE else {"int": hex(value)}
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, type) and _listed(TYPES, value):
        return {"type": value.__name__}
    kind: Any
    for kind in type(value).__mro__[:-1]:
        name = kind.__name__
        if kind is list:
            return [encode(item, refer) for item in list.__iter__(value)]
        if _listed(CONTAINERS, kind):
            return {name: [encode(item, refer) for item in kind.__iter__(value)]}
        if _listed(MAPPINGS, kind):
            return {name: [[encode(k, refer), encode(v, refer)] for k, v in dict.items(value)]}
        if kind in (bytes, bytearray):
            return {name: kind.hex(value)}
        if kind is complex:
            return {name: [value.real, value.imag]}
        if kind is range or kind is slice:
            return {name: [encode(part, refer) for part in (value.start, value.stop, value.step)]}
        if name in WRITTEN and WRITTEN[name][0] == kind.__module__:
            return {name: WRITTEN[name][1](value)}
        if (kind.__module__, name) == ("numpy", "generic"):
            return encode(value.item(), refer)
    return {"ref": refer(value)}


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value that ``encode`` wrote. Raises ValueError or TypeError for anything else."""
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "ref":
        return resolve(int(content))
    if name == "int":
        return int(content, 16)
    if name == "type":
        return TYPES[content]
    if name in CONTAINERS:
        return CONTAINERS[name](decode(item, resolve) for item in content)
    if name in MAPPINGS:
        mapping = MAPPINGS[name]()
        for key, item in content:
            mapping[decode(key, resolve)] = decode(item, resolve)
        return mapping
    if name in ("bytes", "bytearray"):
        return TYPES[name].fromhex(content)
    if name == "complex":
        return complex(*content)
    if name in ("range", "slice"):
        return {"range": range, "slice": slice}[name](*[decode(part, resolve) for part in content])
    if name in WRITTEN:
        module, _, reader = WRITTEN[name]
        read: Any = importlib.import_module(module)
        for part in reader.split("."):
            read = getattr(read, part)
        return read(microseconds=content) if name == "timedelta" else read(content)
    raise ValueError(f"no plain value is called {name!r}")


def _listed(table: dict[str, Any], kind: type) -> bool:
    return table.get(kind.__name__) is kind


def describe(error: BaseException) -> str:
    """One line, whatever its ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
    except BaseException:
        return type(error).__name__


class Channel:
    """Messages over a pair of pipes, one side's turn at a time."""

    def __init__(self, read_from: int, write_to: int) -> None:
        self.read_from, self.write_to = read_from, write_to

    def send(self, message: object) -> None:
        """Raises BrokenPipeError without a reader, OverflowError for more than LONGEST bytes."""
        data = json.dumps(message).encode()
        if len(data) > LONGEST:
            raise OverflowError(f"a value of more than {LONGEST >> 20} MiB cannot be compared")
        data = struct.pack("<I", len(data)) + data
        while data:
            data = data[os.write(self.write_to, data) :]

    def receive(self) -> Any:
        """Raises EOFError when the other side is gone, ValueError for what is no message."""
        (length,) = struct.unpack("<I", self._exactly(4))
        if length > LONGEST:
            raise ValueError(f"a message of {length} bytes")
        return json.loads(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = os.read(self.read_from, length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
