"""The files of results as types: ``result.json``, a verification, ``sweep.json``, ``comparison.json``.

They are plain JSON that older versions wrote too: a reader that takes a folder as it finds it asks with ``get``.
"""

from __future__ import annotations

from typing import Any, TypedDict

from headgate.evaluation.predictions import Figures as Figures

Content = dict[str, Any]
"""A recipe, or a part of one, as its YAML has it: not validated."""


class Check(TypedDict):
    """One line of a verification. ``ok``: None where it could not be asked."""

    name: str
    ok: bool | None
    detail: str


class _How(TypedDict, total=False):
    form: str
    machine: str


class Verification(_How):
    """Whether a run is what it saved. ``machine``: what differs from the one that made the run."""

    verified: bool
    checks: list[Check]


class Environment(TypedDict, total=False):
    """``env.json``: what of a machine and an installation can change a result."""

    versions: dict[str, str]
    hardware: dict[str, Any]
    git_revision: str | None
    command: list[str]


class RunRecord(TypedDict, total=False):
    """``result.json``, by the end of a run; ``continual`` of a stream only."""

    run_id: str
    name: str
    seed: int
    data: dict[str, Figures]
    training: Figures
    evaluation: dict[str, Figures]
    continual: Figures
    versions: dict[str, str]
    hardware: dict[str, Any]
    verification: Verification
    elapsed_seconds: float


class _SweptRun(TypedDict):
    run: str
    status: str
    label: str
    overrides: dict[str, Any]
    verified: bool | None
    metrics: dict[str, float]


class Failure(TypedDict, total=False):
    """Why a run has no result, where it failed."""

    error: str


class SweptRun(_SweptRun, Failure):
    """One run of a sweep: where, which overrides, and every number of its result under its dotted name."""


class SweptGroup(TypedDict):
    """The complete runs that differ only in their seed: mean and, from two on, SD of every metric."""

    label: str
    overrides: dict[str, Any]
    n: int
    mean: dict[str, float]
    sd: dict[str, float]


class SweepTable(TypedDict):
    """``sweep.json``. ``keys``: what was varied."""

    name: str
    keys: list[str]
    runs: list[SweptRun]
    groups: list[SweptGroup]
    versions: list[str]


class ArmRow(TypedDict):
    """One arm of a finished comparison over its seeds."""

    values: list[float]
    mean: float
    sd: float | None
    cv: float | None
    loss: float | None
    item_interval: tuple[float, float] | None
    cost: dict[str, float | None]
    metrics: list[dict[str, Figures]]
    continual: Figures | None
    verified: bool
    runs: dict[str, str]
    tuned: dict[str, object] | None
    equal_time: dict[str, object] | None


class _Contrast(TypedDict):
    differences: list[float]
    t: dict[str, float] | None
    detectable: float | None


class Contrast(_Contrast, total=False):
    """One arm against another: a difference a seed, the paired interval; over items, where both answered the same.

    ``holm_p`` and ``verdict`` are there once all contrasts have been judged together.
    """

    holm_p: float | None
    verdict: str
    bootstrap: dict[str, float]
    mcnemar: list[float]
    discordance: float
    detectable_items: float


class ComparisonTable(TypedDict):
    """``comparison.json``. ``contrasts``: every arm against the baseline; ``pairs``: those that the recipe names."""

    name: str
    metric: str
    higher_is_better: bool
    baseline: str
    model: str
    seeds: list[int]
    arms: dict[str, ArmRow]
    contrasts: dict[str, Contrast]
    pairs: dict[str, Contrast]
    headgate_versions: list[str]
