"""The process that runs the tests and decides. It never executes a line of the solution.

A name that a test uses and does not define stands for the solution's: calling it sends the arguments over and
compares what comes back here, between values of this process's own making. Built-ins and standard modules are this
process's, unless the tests name nothing else (MBPP 126 asks for a function called ``sum``). Arguments are copies:
a test cannot see that its own list was changed in place.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from .confine import Confinement, confine
from .plain_values import Channel, decode, describe, encode
from .solution import status

Tests = list[tuple[str, str]]
FAILURES = (
    "syntax",
    "assertion",
    "error",
    "memory",
    "exit",
)  # what a solution may say of itself: never "passed"


class Lost(BaseException):
    """The solution's process is gone or no longer speaks the protocol: no test can pass. Not an Exception, so that
    a test's own ``except Exception`` does not take it for an answer."""


class RemoteError(Exception):
    """An exception of the solution that no built-in one can carry."""


class Solution:
    """Questions to the solution's process."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.lost: str | None = None
        self.remotes: dict[int, Remote] = {}

    def ask(self, verb: str, *arguments: object) -> Any:
        """Raises Lost, or what the solution raised."""
        sent = [encode(argument, self.refer) for argument in arguments]
        try:
            if self.lost is not None:
                raise EOFError
            self.channel.send([verb, *sent])
            kind, *content = self.channel.receive()
            if kind == "value":
                return decode(content[0], self.resolve)
            name, message = map(str, content)
        except (EOFError, OSError):
            self.lost = self.lost or "gone"
            raise Lost from None
        except (ValueError, TypeError, LookupError, RecursionError, ArithmeticError) as error:
            self.lost = f"an unreadable answer: {describe(error)}"
            raise Lost from None
        raise self.exception(name, message)

    def exception(self, name: str, message: str) -> BaseException:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            try:
                return kind(message) if message else kind()
            except TypeError:  # UnicodeDecodeError and others want more than a message
                pass
        return RemoteError(f"{name}: {message}")

    def refer(self, value: object) -> int:
        if type(value) is Remote:
            return int(object.__getattribute__(value, "_number"))
        raise TypeError(f"a test can hand over plain values only, not a {type(value).__name__}")

    def resolve(self, number: int) -> Remote:
        return self.remotes.setdefault(number, Remote(self, number))


class Remote:
    """An object of the solution's process. Equal to nothing but itself, and not hashable: its owner has no say."""

    __slots__ = ("_number", "_solution")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, solution: Solution, number: int) -> None:
        object.__setattr__(self, "_solution", solution)
        object.__setattr__(self, "_number", number)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, *arguments: object, **named: object) -> Any:
        return self._solution.ask("call", self, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # copy and pickle look for hooks: they are not the owner's to give
        return self._solution.ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._solution.ask("set", self, name, value)

    def __getitem__(self, key: object) -> Any:
        return self._solution.ask("item", self, key)

    def __setitem__(self, key: object, value: object) -> None:
        self._solution.ask("put", self, key, value)

    def __len__(self) -> int:
        return int(self._solution.ask("len", self))

    def __iter__(self) -> Iterator[object]:
        iterator = self._solution.ask("iter", self)
        while True:
            try:
                yield self._solution.ask("next", iterator)
            except StopIteration:
                return

    def __bool__(self) -> bool:
        return self._solution.ask("bool", self) is True

    def __str__(self) -> str:
        return str(self._solution.ask("str", self))

    def __float__(self) -> float:
        return float(self._solution.ask("float", self))

    def __repr__(self) -> str:
        return "<an object of the solution>"


def names(source: str) -> tuple[set[str], set[str]]:
    """What a piece of tests loads, and what it defines. Empty for what is no Python."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(), set()
    loads = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    defines = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defines |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    defines |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    defines |= {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    return loads, defines


def subjects(tests: Tests) -> set[str]:
    """The names that stand for the solution's."""
    pairs = [names(source) for _, source in tests]
    wanted = {name for loads, _ in pairs for name in loads if not name.startswith("__")}
    wanted -= {name for _, defines in pairs for name in defines}
    foreign = {name for name in wanted if not hasattr(builtins, name)}
    return foreign - sys.stdlib_module_names or foreign or wanted


class Judge:
    """Runs pieces of tests one after the other in one module. ``tell``: reports ("start" | "end", ...)."""

    def __init__(self, solution: Solution, tests: Tests, tell: Callable[..., None]) -> None:
        self.solution, self.tests, self.tell = solution, tests, tell
        self.subjects = subjects(tests)
        self.module: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}

    def run(self) -> None:
        for number, (name, source) in enumerate(self.tests, 1):
            self.tell("start", number)
            try:
                tree = ast.parse(source)
                # One statement at a time, so that each sees the solution's names as they are then.
                steps = [compile(ast.Module([node], []), f"<{name}>", "exec") for node in tree.body]
            except (SyntaxError, ValueError) as error:
                return self.tell("end", "syntax", number, describe(error))
            except (MemoryError, RecursionError) as error:
                return self.tell("end", status(error), number, describe(error))
            for node, code in zip(tree.body, steps):
                failure = self.step(node, code)
                if self.solution.lost == "gone":
                    return None  # how it went is for its parent to say
                if self.solution.lost is not None:
                    return self.tell("end", "error", number, self.solution.lost)
                if failure is not None:
                    return self.tell("end", status(failure), number, describe(failure))
        return self.tell("end", "passed", len(self.tests), "")

    def step(self, node: ast.stmt, code: types.CodeType) -> BaseException | None:
        try:
            self.bind(node)
            exec(code, self.module)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.solution.ask("import", ast.unparse(node))
        except BaseException as error:
            return error
        return None

    def bind(self, node: ast.stmt) -> None:
        """Standard modules, then the solution's names, where the tests have none of their own."""
        loads = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        for name in loads & sys.stdlib_module_names - self.subjects - self.module.keys():
            if not hasattr(builtins, name):
                self.module[name] = __import__(name)
        if wanted := sorted(loads & self.subjects):
            answer = self.solution.ask("names", wanted)
            if type(answer) is dict:
                self.module.update({name: answer[name] for name in wanted if name in answer})


def judge(tests: Tests, channel: Channel, report: int, confinement: Confinement) -> None:
    """Confine this process, await the solution, run the tests, report. Does not return."""

    def tell(*parts: object) -> None:
        os.write(report, json.dumps(parts).encode() + b"\n")

    try:
        confine(confinement)
        solution = Solution(channel)
        kind, *content = channel.receive()
        if kind != "confined":
            tell("end", "refused", 0, str(content))
            os._exit(1)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        tell("end", "refused", 0, describe(error))
        os._exit(1)
    tell("start", 0)
    try:
        channel.send(["go"])
        kind, *content = channel.receive()
        if kind == "ready":
            Judge(solution, tests, tell).run()
        elif kind == "failed":
            failure, detail = map(str, content)
            tell("end", failure if failure in FAILURES else "error", 0, detail[:300])
        else:
            tell("end", "error", 0, "an unreadable answer")
    except (EOFError, OSError):
        pass  # the solution's process is gone: its parent says how
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        tell("end", "error", 0, f"an unreadable answer: {describe(error)}")
    except MemoryError:
        tell("end", "memory", 0, "the answer was too large for the judge")
    os._exit(0)
