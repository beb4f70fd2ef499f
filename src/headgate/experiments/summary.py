"""The table of a comparison: arms, costs, paired contrasts against the baseline, verdicts in words."""

from __future__ import annotations

import statistics as plain_statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from headgate.errors import ConfigError
from headgate.evaluation import continual
from headgate.evaluation.predictions import read_predictions
from headgate.experiments import statistics
from headgate.experiments.metric import Metric, chosen_baseline, chosen_metric
from headgate.experiments.records import ArmRow, ComparisonTable, Contrast, Figures, RunRecord
from headgate.experiments.run_directory import RunDirectory

if TYPE_CHECKING:  # a report reads summaries without a recipe's models
    from headgate.experiments.recipe import Recipe

Runs = Mapping[str, Mapping[int, RunDirectory]]


def summarise(
    recipe: Recipe, runs: Runs, state: Mapping[str, Mapping[str, dict[str, object]]]
) -> ComparisonTable:
    """The table of arms and the paired statistics against the baseline, as JSON."""
    assert recipe.compare is not None
    metric, baseline, seeds = chosen_metric(recipe), chosen_baseline(recipe), recipe.compare.seeds
    rows: dict[str, ArmRow] = {}
    for name, by_seed in runs.items():
        results = {seed: directory.result() for seed, directory in by_seed.items()}
        values = [metric.read(results[seed], str(by_seed[seed].path)) for seed in seeds]
        rows[name] = {
            "values": values,
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "cv": statistics.coefficient_of_variation(values),
            "loss": task_loss([results[seed]["evaluation"] for seed in seeds]),
            "item_interval": item_interval(metric, results[seeds[0]], float(np.mean(values))),
            "cost": _cost([results[seed]["training"] for seed in seeds]),
            "metrics": [results[seed]["evaluation"] for seed in seeds],
            "continual": _continual([results[seed].get("continual") for seed in seeds]),
            "verified": all(directory.verified for directory in by_seed.values()),
            "runs": {str(seed): str(directory.path) for seed, directory in by_seed.items()},
            "tuned": state["tuned"].get(name),
            "equal_time": state["equal_time"].get(name),
        }
    pairs = {name: (name, baseline) for name in runs if name != baseline}
    named = {f"{one} - {other}": (one, other) for one, other in recipe.compare.contrasts}
    versions = {d.result()["versions"]["headgate"] for by_seed in runs.values() for d in by_seed.values()}
    return {
        "name": recipe.name,
        "metric": ".".join(metric.path),
        "higher_is_better": metric.higher_is_better,
        "baseline": baseline,
        "model": recipe.model.name_or_path,
        "seeds": seeds,
        "arms": rows,
        "contrasts": judged(metric, runs, rows, pairs),
        "pairs": judged(metric, runs, rows, named),
        "headgate_versions": sorted(versions),
    }


def judged(
    metric: Metric, runs: Runs, rows: Mapping[str, ArmRow], pairs: Mapping[str, tuple[str, str]]
) -> dict[str, Contrast]:
    """Contrasts ``first - second`` with verdicts; Holm's correction over all of them."""
    found = {
        name: contrast(metric, runs[other], runs[one], rows[other]["values"], rows[one]["values"])
        for name, (one, other) in pairs.items()
    }
    adjusted = statistics.holm({name: c["t"]["p"] for name, c in found.items() if c["t"] is not None})
    for name, one_contrast in found.items():
        interval = statistics.Interval(**one_contrast["t"]) if one_contrast["t"] else None
        one_contrast["holm_p"] = adjusted.get(name)
        one_contrast["verdict"] = statistics.verdict(
            interval,
            adjusted.get(name),
            higher_is_better=metric.higher_is_better,
            differences=one_contrast["differences"],
        )
    return found


def task_loss(evaluations: Sequence[Mapping[str, Figures]]) -> float | None:
    """Mean over seeds of the first perplexity task's loss, where one was asked for."""
    losses = [next((m["loss"] for m in tasks.values() if "loss" in m), None) for tasks in evaluations]
    known = [loss for loss in losses if loss is not None]
    return float(np.mean(known)) if known else None


def item_interval(metric: Metric, result: RunRecord, mean: float) -> tuple[float, float] | None:
    """Wilson's 95% interval of an accuracy over its items: how far chance in the items alone could move it."""
    if metric.path[0] != "evaluation" or metric.path[-1] != "accuracy":
        return None
    items = int(result["evaluation"][metric.path[1]]["items"])
    found = binomtest(round(mean * items), items).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def contrast(
    metric: Metric,
    base: Mapping[int, RunDirectory],
    other: Mapping[int, RunDirectory],
    base_values: list[float],
    other_values: list[float],
) -> Contrast:
    """One arm against the baseline: per-seed differences, intervals, McNemar, what could have been seen."""
    differences = [b - a for a, b in zip(base_values, other_values, strict=True)]
    interval = statistics.paired_t(differences)
    out: Contrast = {
        "differences": differences,
        "t": interval.__dict__ if interval else None,
        "detectable": statistics.detectable_over_seeds(differences),
    }
    scores = paired_items(metric, base, other)
    if scores is not None:
        a, b = scores
        out["bootstrap"] = statistics.crossed_bootstrap(b - a).__dict__
        if metric.higher_is_better:
            out["mcnemar"] = [
                statistics.mcnemar(list(x > 0.5), list(y > 0.5)) for x, y in zip(a, b, strict=True)
            ]
            out["discordance"] = float(np.mean(a != b))
            out["detectable_items"] = statistics.detectable_over_items(out["discordance"], a.shape[1])
    return out


def paired_items(
    metric: Metric, base: Mapping[int, RunDirectory], other: Mapping[int, RunDirectory]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """``[seeds, items]`` scores of both arms, matched by prompt; None for a metric without items."""
    if metric.path[0] != "evaluation":
        return None
    task, field = metric.path[1], "correct" if metric.path[-1] == "accuracy" else "loss"
    stacks: list[list[list[float]]] = [[], []]
    for seed in base:
        pair = [read_predictions(d[seed].predictions / f"{task}.jsonl") for d in (base, other)]
        keys = [[item.get("prompt_hash", item["id"]) for item in items] for items in pair]
        if keys[0] != keys[1]:
            raise ConfigError(f"seed {seed}: the arms were evaluated on different items of {task}")
        for stack, items in zip(stacks, pair, strict=True):
            stack.append([float(item[field]) for item in items])
    return np.array(stacks[0]), np.array(stacks[1])


def _continual(found: Sequence[Figures | None]) -> Figures | None:
    """Means over seeds of a stream's figures, and of every skill's loss at its end; None where there is no stream."""
    known = [one for one in found if one is not None]
    if not known:
        return None
    figures = {
        name: None if known[0].get(name) is None else float(np.mean([one[name] for one in known]))
        for name in continual.FIGURES
    }
    ends = np.mean([one["matrix"][-1] for one in known], axis=0)
    return {"skills": dict(zip(known[0]["skills"], ends.tolist(), strict=True)), **figures}


def _cost(trainings: Sequence[Figures]) -> dict[str, float | None]:
    """Medians over seeds of what training took; accepted steps where a gate reports them."""
    names = ("steps", "trained_tokens", "flops", "seconds", "memory_peak", "eval_loss")
    cost: dict[str, float | None] = {}
    for name in names:
        values = [t[name] for t in trainings if t.get(name) is not None]
        cost[name] = plain_statistics.median(values) if values else None
    extra = {k for t in trainings for k in t if "/" in k}
    for name in sorted(extra):
        values = [t[name] for t in trainings if isinstance(t.get(name), (int, float))]
        if values:
            cost[name] = plain_statistics.median(values)
    return cost
