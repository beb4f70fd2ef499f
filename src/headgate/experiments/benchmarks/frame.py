"""The frame of a benchmark: arms interleaved A B A B in one process, medians, ratios, and computed checks."""

from __future__ import annotations

import difflib
import gc
import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from headgate.errors import ConfigError
from headgate.experiments.environment import environment
from headgate.experiments.records import Figures

Say = Callable[[str], None]
SHARED = ("frame", "live_bytes", "rows_ideal")


@dataclass
class Check:
    """A target and what was measured. ``ok`` is computed, or None with a ``why`` where it could not be measured."""

    name: str
    value: float | None
    target: str
    ok: bool | None
    why: str = ""

    def as_dict(self) -> Figures:
        return {"name": self.name, "value": self.value, "target": self.target, "ok": self.ok} | (
            {"why": self.why} if self.why else {}
        )


def at_most(name: str, value: float, limit: float) -> Check:
    return Check(name, value, f"<= {limit:g}", value <= limit)


def at_least(name: str, value: float, limit: float) -> Check:
    return Check(name, value, f">= {limit:g}", value >= limit)


def not_measured(name: str, target: str, why: str) -> Check:
    return Check(name, None, target, None, why)


@dataclass
class Report:
    """What a benchmark returns; ``as_dict`` is its last line of output."""

    name: str
    arms: dict[str, Figures] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    ideal: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def as_dict(self) -> Figures:
        found = environment()
        return {
            "name": self.name,
            "arms": self.arms,
            "ratios": self.ratios,
            "ideal": self.ideal,
            "checks": [check.as_dict() for check in self.checks],
            "hardware": found["hardware"],
            "versions": found["versions"],
            "git_revision": found["git_revision"],
        }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every arm in every round, the arms' order alternating so that drift hits all alike."""
    for _ in range(warmup):
        for work in arms.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in list(arms) if turn % 2 == 0 else reversed(list(arms)):
                synchronize()
                start = clock()
                arms[name]()
                synchronize()
                seconds[name].append(clock() - start)
            gc.collect(0)
    finally:
        if enabled:
            gc.enable()
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median_s": statistics.median(seconds),
        "iqr_s": quartiles[2] - quartiles[0],
        "rounds": len(seconds),
    }


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within each round: what a noisy machine changes least."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def benchmark_names() -> list[str]:
    """Files of this folder, what they share left out."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in SHARED)


def run_benchmark(name: str, *, quick: bool, say: Say) -> Figures:
    """Run ``benchmarks/<name>.py``'s ``run(quick, say) -> Report``. Raises ConfigError for an unknown name."""
    names = benchmark_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(
            f"no benchmark {name!r}: "
            + (f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}")
        )
    module = importlib.import_module(f"headgate.experiments.benchmarks.{name}")
    report: Report = module.run(quick=quick, say=say)
    return report.as_dict()
