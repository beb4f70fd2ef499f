"""The verdict and the warnings of a page, in words. Numbers come from the comparison; none is computed here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator

from headgate.experiments.metric import Metric
from headgate.experiments.records import Contrast
from headgate.experiments.report.study import Arm, Study

Kind = Literal["helps", "hurts", "none", "open"]


@dataclass(frozen=True)
class Verdict:
    """One arm against the baseline: what was found, by how much, at what cost."""

    arm: str
    kind: Kind
    words: str
    details: Sequence[str]
    interval: tuple[float, float, float] | None = None
    """Low, mean, high."""


def number(metric: Metric | None, value: float, *, signed: bool = False) -> str:
    """A value of the metric: accuracies in percent, anything else with four decimals."""
    sign = "+" if signed else ""
    share = is_share(metric)
    text = f"{100 * value:{sign}.1f}" if share else f"{value:{sign}.4f}"
    return (text + (" pp" if signed else "%") if share else text).replace("-", "−")


def is_share(metric: Metric | None) -> bool:
    """Whether the metric is a rate in [0, 1], shown in percent."""
    return metric is not None and ("accuracy" in metric.path[-1] or metric.path[-1].startswith("pass@"))


def metric_axis(axis: Axis, metric: Metric | None, *, signed: bool = False) -> None:
    """Ticks as ``number`` writes values: percent, or percentage points for differences."""
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if is_share(metric):
        unit = " pp" if signed else "%"
        axis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{100 * x:.3g}{unit if x else ''}".replace("-", "−"))
        )


def metric_name(metric: Metric | None) -> str:
    """``accuracy of exact_match_wordmath``, ``validation loss``."""
    if metric is None:
        return "no metric"
    if metric.path == ("training", "eval_loss"):
        return "validation loss"
    if len(metric.path) == 1:  # of a map whose cells have one each
        return metric.path[0]
    return f"{metric.path[-1]} of {'.'.join(metric.path[1:-1])}" if len(metric.path) > 2 else metric.name


def interval(metric: Metric | None, found: Mapping[str, float] | None) -> str:
    """``+1.2 pp [+0.3, +2.1]``."""
    if found is None:
        return "–"
    low, high = (number(metric, found[side], signed=True).removesuffix(" pp") for side in ("low", "high"))
    return f"{number(metric, found['mean'], signed=True)} [{low}, {high}]"


def seeds_phrase(study: Study) -> str:
    """``n = 3 seeds (42, 123, 456)``; while a comparison goes on, how many of them every arm has."""
    count = len(study.seeds)
    planned = f"{count} seed{'s' * (count != 1)} ({', '.join(map(str, study.seeds))})"
    if study.kind != "comparison" or study.summary is not None:
        return f"n = {planned}"
    whole = [
        seed
        for seed in study.seeds
        if all(seed in arm.runs and arm.runs[seed].result is not None for arm in study.arms)
    ]
    return f"{len(whole)} of {planned} complete in every arm so far"


def verdicts(study: Study) -> list[Verdict]:
    """One an arm other than the baseline, in the comparison's order."""
    return [_verdict(study, name, contrast) for name, contrast in study.contrasts.items()]


def _verdict(study: Study, name: str, contrast: Contrast) -> Verdict:
    metric, cost, t = study.metric, cost_phrase(study, study.arm(name)), contrast["t"]
    if t is None:
        mean = number(metric, statistics.fmean(contrast["differences"]), signed=True)
        return Verdict(name, "open", "no interval: fewer than three seeds", [f"mean difference {mean}", cost])
    span = (t["low"], t["mean"], t["high"])
    p = f", Holm\u00a0p\u00a0=\u00a0{contrast['holm_p']:.2g}" if contrast["holm_p"] is not None else ""
    details = [f"{interval(metric, t)}{p}"]
    said = contrast["verdict"]
    if said.startswith("no detectable"):
        most = _size(metric, max(abs(t["low"]), abs(t["high"])))
        if contrast["detectable"]:
            details.append(
                f"smallest difference these seeds could have shown: {_size(metric, contrast['detectable'])}"
            )
        return Verdict(name, "none", f"no detectable difference (at most {most})", [*details, cost], span)
    kind: Kind = "helps" if said.startswith("helps") else "hurts"
    trained = study.arm(name).trained
    verb = kind if trained else {"helps": "better", "hurts": "worse"}[kind]
    return Verdict(name, kind, f"{verb} by {_size(metric, abs(t['mean']))}", [*details, cost], span)


def _size(metric: Metric | None, value: float) -> str:
    return number(metric, value, signed=True).lstrip("+")


def cost_phrase(study: Study, arm: Arm) -> str:
    """Training seconds and FLOPs as multiples of the baseline's, where both trained."""
    assert study.baseline is not None
    base = study.arm(study.baseline)
    parts = []
    for name, label in (("seconds", "training time"), ("flops", "FLOPs")):
        mine, theirs = (statistics.median(a.training(name) or [0.0]) for a in (arm, base))
        if mine and theirs:
            parts.append(f"{mine / theirs:.2f}× {label}")
    if not statistics.median(arm.training("seconds") or [0.0]):
        return "no training"
    return ", ".join(parts) or f"{statistics.median(arm.training('seconds')):.1f} s of training"


def headline(study: Study) -> str:
    """One sentence for the whole comparison."""
    if study.kind == "map":
        return _of_map(study)
    if study.kind != "comparison":
        return _best(study)
    if not study.runs:
        return "This comparison is empty: no arm has run yet"
    if study.summary is None:
        done = sum(run.result is not None for run in study.runs)
        return f"Unfinished: {done} complete run{'s' * (done != 1)} so far, and no verdict before the last"
    found = verdicts(study)
    if not found:
        return "Nothing to compare: the baseline is the only arm"
    if all(v.kind == "open" for v in found):
        count = len(study.seeds)
        return f"No verdict: {count} seed{'s carry' if count != 1 else ' carries'} no interval"
    trained = [v for v in found if study.arm(v.arm).trained]
    if not trained:
        return f"Nothing was trained besides {study.baseline}"
    found = trained  # a model left as it was is a reference, and neither helps nor hurts
    names = {kind: [v.arm for v in found if v.kind == kind] for kind in ("helps", "hurts", "none")}
    if len(names["none"]) == len(found):
        return f"No detectable difference from {study.baseline}: {_join(names['none'])}"
    verbs = {"helps": ("helps", "help"), "hurts": ("hurts", "hurt")}
    parts = [f"{_join(names[k])} {verb[len(names[k]) > 1]}" for k, verb in verbs.items() if names[k]]
    if names["none"]:
        parts.append(f"{_join(names['none'])} cannot be told from it")
    return f"Against {study.baseline}: {'; '.join(parts)}"


def _of_map(study: Study) -> str:
    """Which arms beat the baseline in how many cells: each cell has a verdict of its own."""
    judged: dict[str, list[str]] = {}
    for cell in study.cells.values():
        for arm, contrast in cell["contrasts"].items():
            if cell["arms"][arm]["cost"]["steps"]:
                judged.setdefault(arm, []).append(contrast["verdict"].split()[0])
    parts = [
        f"{arm} helps in {found.count('helps')} and hurts in {found.count('hurts')} of {len(found)}"
        for arm, found in judged.items()
    ]
    return f"Against {study.baseline}, by cell: {'; '.join(parts)}"


def _best(study: Study) -> str:
    """A single run's value; of several runs the best mean, which is a search's result and no verdict."""
    metric = study.metric
    means = {
        a.name: statistics.fmean(v) for a in study.arms if metric and (v := list(a.values(metric).values()))
    }
    if metric is None or not means:
        return "No run is complete yet"
    if study.kind == "run":
        return f"One run: {metric_name(metric)} {number(metric, next(iter(means.values())))}"
    name = (max if metric.higher_is_better else min)(means, key=lambda arm: means[arm])
    return (
        f"{len(study.runs)} runs of {len(study.arms)} settings; the best mean {metric_name(metric)} is "
        f"{number(metric, means[name])}, with {name}. A search has no baseline, so this is no verdict"
    )


def warnings(study: Study, *, live: bool = False) -> list[str]:
    """What a reader must know before believing the page. ``live``: runs still go on, and a table says how far they are."""
    found = []
    if study.kind == "comparison" and study.runs and len(study.seeds) < 3:
        found.append(
            f"Fewer than three seeds ({len(study.seeds)}): no interval and no verdict is given. Differences below are "
            "single observations; the multi-seed evidence is kept in EXPERIMENTS.md."
        )
    tabled = sum(not run.on_disk for run in study.runs)
    if tabled:
        found.append(
            f"Drawn from the comparison's table: the folders of {tabled} of {len(study.runs)} runs are not here, so their curves, "
            "items, recipes and what a method did inside are left out, and costs are medians over seeds."
        )
    if study.missing and not live:
        found.append(f"Missing: {'; '.join(study.missing)}.")
    unfinished = [run for run in study.runs if run.result is None]
    if unfinished and not live:
        told = ", ".join(f"{run.directory.path.name} ({run.directory.status})" for run in unfinished)
        found.append(f"Not complete, and shown only as far as they came: {told}.")
    if study.metric is not None:
        for arm in study.arms:
            complete = [seed for seed, run in arm.runs.items() if run.result is not None]
            without = [seed for seed in complete if seed not in arm.values(study.metric)]
            if without:
                seeds = ", ".join(map(str, without))
                found.append(f"{arm.name} has no {metric_name(study.metric)} at seed {seeds}.")
    for what, values in _environments(study).items():
        if len(values) > 1:
            found.append(f"Mixed {what}: {_join(sorted(values))}. {MIXED[what]}")
    return found


MIXED = {
    "Headgate versions": "Results of different versions are compared here; run the older arms again to be sure.",
    "hardware": "Times and memory of different machines are not comparable.",
}


def _environments(study: Study) -> dict[str, set[str]]:
    versions, machines = set(), set()
    for run in study.runs:
        env = run.environment
        if not env:  # of a run whose folder is not here nobody knows
            continue
        versions.add(env["versions"]["headgate"])
        hardware = env["hardware"]
        machines.add(f"{', '.join(hardware['gpus']) or hardware['processor']} ({hardware['cores']} cores)")
    return {"Headgate versions": versions, "hardware": machines}


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
