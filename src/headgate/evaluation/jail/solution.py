"""The process that executes what the model wrote, and answers the judge's calls.

It holds no test, no expected value and no way to say that it passed: whatever the code here does to its
interpreter (built-ins, frames, this file's own functions), the judge sees only the values that it sends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .confine import Confinement, confine
from .plain_values import Channel, decode, describe, encode

VERBS: dict[str, Callable[..., object]] = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "item": lambda container, key: container[key],
    "put": lambda container, key, value: container.__setitem__(key, value),
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "str": str,
    "float": float,
}


class Objects:
    """What the judge holds references to; the same object always has the same number."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.numbers: dict[int, int] = {}

    def refer(self, value: object) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.all)
            self.all.append(value)  # kept alive: an id is unique only among the living
        return self.numbers[id(value)]

    def resolve(self, number: int) -> Any:
        return self.all[number]


def solve(source: str, channel: Channel, confinement: Confinement) -> None:
    """Confine this process, execute ``source`` in a module of its own, then serve. Does not return."""
    try:
        confine(confinement)
    except (OSError, RuntimeError, ValueError) as error:
        channel.send(["refused", describe(error)])
        os._exit(1)
    channel.send(["confined"])
    channel.receive()  # the judge is there too, and the clock runs
    module = types.ModuleType("solution")  # not __main__: a guarded script does not start
    sys.modules["solution"] = module
    sys.argv = ["solution.py"]
    verdict = execute(source, module.__dict__)
    flush()
    channel.send(verdict)
    if verdict == ["ready"]:
        serve(module.__dict__, channel)
    os._exit(0)


def execute(source: str, namespace: dict[str, object]) -> list[str]:
    """["ready"], or ["failed", status, detail]."""
    try:
        code = compile(source, "<solution>", "exec")
    except (SyntaxError, ValueError) as error:
        return ["failed", "syntax", describe(error)]
    except (MemoryError, RecursionError) as error:
        return ["failed", "memory" if isinstance(error, MemoryError) else "error", describe(error)]
    try:
        exec(code, namespace)
    except BaseException as error:
        return ["failed", status(error), describe(error)]
    return ["ready"]


def status(error: BaseException) -> str:
    """The name of an ending by exception."""
    kinds = {AssertionError: "assertion", MemoryError: "memory", SystemExit: "exit"}
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "error")


def serve(namespace: dict[str, object], channel: Channel) -> None:
    """Answer until the judge is gone."""
    objects = Objects()
    while True:
        try:
            verb, *arguments = channel.receive()
        except EOFError:
            return
        try:
            answer = perform(verb, [decode(argument, objects.resolve) for argument in arguments], namespace)
            reply = ["value", encode(answer, objects.refer)]
        except BaseException as error:
            reply = ["raised", *name_and_message(error)]
        flush()
        try:
            channel.send(reply)
        except OverflowError as error:
            channel.send(["raised", *name_and_message(error)])


def perform(verb: str, arguments: list[Any], namespace: dict[str, Any]) -> Any:
    if verb == "names":
        return {name: namespace[name] for name in arguments[0] if name in namespace}
    if verb == "import":  # a test's imports serve the solution too, as in one module
        exec(arguments[0], namespace)
        return None
    return VERBS[verb](*arguments)


def name_and_message(error: BaseException) -> tuple[str, str]:
    """The built-in exception that it is or derives from, and what it says."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    text = describe(error)
    return name, text.removeprefix(f"{name}: ") if text != name else ""


def flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
