"""Examine a method: every law once, with what broke it."""

from __future__ import annotations

import importlib
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.names import METHODS
from headgate.methods.registry import method_class, register_method
from headgate.testing.case import Case, NotApplicable
from headgate.testing.law import LAWS
from headgate.testing.laws_of_pairs import PARTNERS

for _module in ("host_reads", "two_ranks"):  # each enters its law
    importlib.import_module(f"headgate.testing.{_module}")


@dataclass(frozen=True)
class LawResult:
    """``kept``, ``broken`` or ``n/a``, and why."""

    law: str
    verdict: Literal["kept", "broken", "n/a"]
    detail: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class LawsBroken(AssertionError):
    """A method breaks laws; ``results`` holds all of them."""

    def __init__(self, name: str, results: Sequence[LawResult]) -> None:
        self.results = list(results)
        broken = [f"{r.law}: {r.detail}" for r in results if r.verdict == "broken"]
        super().__init__(f"{name} breaks {len(broken)} of {len(results)} laws:\n  " + "\n  ".join(broken))


def examine(
    method: str | type[Method],
    model: str = "random:llama",
    *,
    laws: Sequence[str] | None = None,
    on_result: Callable[[LawResult], None] = lambda _result: None,
    **options: object,
) -> list[LawResult]:
    """Every law (or those named), in order; nothing is raised for a broken one.

    Args:
        method: a registered name, or a Method class, which is registered for this process.
        model: any model that a recipe can name; laws train it for a few steps.
        options: settings of the method; Headgate's own have small defaults here.
    """
    name = _registered(method)
    unknown = sorted(set(laws or ()) - set(LAWS))
    if unknown:
        raise ConfigError(f"there is no law {unknown[0]!r}: the laws are {', '.join(LAWS)}")
    results = []
    for title, check in LAWS.items():
        if laws is not None and title not in laws:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = Case(name, {**PARTNERS.get(name, {}), **options}, Path(folder), model)
            results.append(_result(title, check, case))
        on_result(results[-1])
    return results


def _result(title: str, check: Callable[[Case], None], case: Case) -> LawResult:
    try:
        check(case)
    except NotApplicable as reason:
        return LawResult(title, "n/a", str(reason))
    except AssertionError as error:
        return LawResult(
            title, "broken", " ".join(str(error).split())[:400] or "an assertion without words failed"
        )
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return LawResult(
            title, "broken", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        )
    return LawResult(title, "kept")


def conform(method: str | type[Method], model: str = "random:llama", **options: Any) -> list[LawResult]:
    """As ``examine``; raises LawsBroken, which lists what broke, if any law is."""
    results = examine(method, model, **options)
    if any(result.verdict == "broken" for result in results):
        raise LawsBroken(_registered(method), results)
    return results


def _registered(method: str | type[Method]) -> str:
    if isinstance(method, str):
        return method_class(method).name
    if method.name not in METHODS.names():
        register_method(method)
    return method.name
