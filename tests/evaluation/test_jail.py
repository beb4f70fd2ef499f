"""The parts of the jail by themselves: the filter's arithmetic, and what a value is after it crossed."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.evaluation.jail import landlock, system_calls
from headgate.evaluation.jail.judge import subjects
from headgate.evaluation.jail.plain_values import Channel, decode, encode

PID = 4242
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def verdict(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter answers, by executing its BPF."""
    words = {0: number, 4: system_calls.AUDIT[machine] if audit is None else audit}
    words |= {16 + 8 * i: argument & 0xFFFFFFFF for i, argument in enumerate(arguments)}
    lines, place, accumulator = system_calls.program(machine, PID), 0, 0
    while True:
        operation, yes, no, value = lines[place]
        place += 1
        if operation == system_calls.LOAD:
            accumulator = words.get(value, 0)
        elif operation == system_calls.RETURN:
            return value
        else:
            true = {
                system_calls.EQUAL: accumulator == value,
                system_calls.AT_LEAST: accumulator >= value,
                system_calls.ANY_BIT: accumulator & value != 0,
            }[operation]
            place += yes if true else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_what_it_names_and_nothing_else(machine: str) -> None:
    column = list(system_calls.AUDIT).index(machine)
    free = {pair[column] for pair in system_calls.FREE.values()} - {None}
    by_argument = {
        getattr(system_calls, name)[column] for name in ("CLONE", "KILL", "TGKILL", "SOCKETPAIR", "PRLIMIT")
    }
    by_argument |= {getattr(system_calls, name)[column] for name in ("FCNTL", "IOCTL", "PRCTL")}
    for number in range(600):
        if number in free:
            assert verdict(machine, number) == ALLOW
        elif number not in by_argument:
            assert verdict(machine, number) == (EPERM if number < 424 else ENOSYS), number
    assert verdict(machine, 0, audit=0x40000003) == KILL


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_looks_at_arguments(machine: str) -> None:
    column = list(system_calls.AUDIT).index(machine)
    number = {
        name: getattr(system_calls, name)[column]
        for name in ("CLONE", "KILL", "TGKILL", "SOCKETPAIR", "FCNTL")
    }
    thread = 0x3D0F00  # what pthread_create asks for
    assert verdict(machine, number["CLONE"], thread) == ALLOW
    for flags in (17, 0x4111, thread | 0x10000000, 0x10000011):
        assert verdict(machine, number["CLONE"], flags) == EPERM
    for name in ("KILL", "TGKILL"):
        assert verdict(machine, number[name], PID) == ALLOW
        assert {verdict(machine, number[name], other) for other in (1, -1, 0, PID - 1)} == {EPERM}
    assert verdict(machine, number["SOCKETPAIR"], 1) == ALLOW
    assert verdict(machine, number["SOCKETPAIR"], 2) == EPERM
    assert verdict(machine, number["FCNTL"], 3, 8) == EPERM  # F_SETOWN
    assert machine == "aarch64" or verdict(machine, 0x40000000 + 39) == EPERM


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False) | st.fractions() | st.dates() | st.datetimes().map(lambda moment: moment.replace(fold=0))
    | st.timedeltas(max_value=datetime.timedelta(days=9999)) | st.integers(10**15, 10**60),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)  # fmt: skip


@given(PLAIN)
def test_a_plain_value_crosses_unchanged(value: Any) -> None:
    crossed = decode(json.loads(json.dumps(encode(value, pytest.fail))), pytest.fail)
    assert crossed == value and type(crossed) is type(value) and repr(crossed) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        collections.Counter("abca"),
        collections.OrderedDict([(2, 1), (1, 2)]),
        collections.deque([1, 2]),
        {1, 2, "x"},
        frozenset({(1, 2), None}),
        range(2, 9, 3),
        slice(1, None),
        bytearray(b"x"),
        float("inf"),
        -0.0,
        10**5000,
        "\ud800",
        int,
        datetime.time(1, 2),
        decimal.Decimal("1.10"),
        fractions.Fraction(1, 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_of_the_standard_library(value: Any) -> None:
    crossed = decode(json.loads(json.dumps(encode(value, pytest.fail))), pytest.fail)
    assert crossed == value and type(crossed) is type(value)


def test_what_a_class_defines_does_not_cross() -> None:
    for base, plain in (
        (int, 7),
        (str, "x"),
        (list, [1]),
        (dict, {1: 2}),
        (tuple, (1,)),
        (float, 1.5),
        (set, {1}),
    ):
        equal = type("Equal", (base,), {"__eq__": lambda self, other: True, "__hash__": None})
        crossed = decode(json.loads(json.dumps(encode(equal(plain), pytest.fail))), pytest.fail)
        assert type(crossed) is base and crossed == plain and crossed != "another"


def test_numpy_scalars_cross_as_numbers_and_arrays_as_references() -> None:
    import numpy as np

    assert encode([np.float64(1.5), np.int64(2), np.bool_(True)], pytest.fail) == [1.5, 2, True]
    assert encode(np.zeros(3), lambda value: 7) == {"ref": 7}


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        (["assert f(2) == set([3])"], {"f"}),
        (["assert sum(1, 2) == 3"], {"sum"}),
        (["assert set(string(1)) == {2}"], {"string"}),
        (["root = Node(1)", "assert height(root) == len([1])"], {"Node", "height"}),
        (["import math", "assert math.isclose(f(2), 3)"], {"f"}),
        (["assert math.isclose(f(2), 3)"], {"f"}),
        (["def check(candidate):\n    assert candidate(2) == g(3)", "check(f)"], {"f", "g"}),
        (["assert [f(x) for x in range(3)] == [__name__]"], {"f"}),
        (["f("], set()),
    ],
)
def test_which_names_stand_for_the_solution(tests: list[str], expected: set[str]) -> None:
    assert subjects([("test", source) for source in tests]) == expected


def test_a_message_is_bounded() -> None:
    a, b = os.pipe()
    channel = Channel(a, b)
    channel.send({"x": [1, "é"]})
    assert channel.receive() == {"x": [1, "é"]}
    os.write(b, b"\xff\xff\xff\x7f")
    with pytest.raises(ValueError, match="2147483647 bytes"):
        channel.receive()
    os.close(b)
    with pytest.raises(EOFError):
        channel.receive()
    os.close(a)


@pytest.mark.parametrize("version", range(1, 10))
def test_each_landlock_version_is_asked_for_what_it_knows(version: int) -> None:
    files, network, scopes = landlock.handled(version)
    assert bin(files).count("1") == {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    assert (network > 0, scopes > 0) == (version >= 4, version >= 6)
