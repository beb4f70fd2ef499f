"""Draws the figures of docs/images from the benchmark results that are committed.

python scripts/plot_benchmarks.py      # benchmarks/results/{controller,novelty}*.json -> docs/images/*.{svg,png}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from headgate.experiments.report.figures.pareto import frontier, hypervolume
from headgate.experiments.report.style import MARKERS, MUTED, OKABE_ITO, house_style, save

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"


def controller(arms: dict[str, Any]) -> Figure:
    """Realised acceptance against the target, and the way of the threshold at .3."""
    drawing = Figure(figsize=(9.0, 3.4))
    held, path = drawing.subplots(1, 2)
    kinds = list(dict.fromkeys(arm["kind"] for arm in arms.values()))
    held.plot([0, 0.8], [0, 0.8], color=MUTED, linewidth=0.8)
    for index, kind in enumerate(kinds):
        style = {"color": OKABE_ITO[index], "label": kind}
        mine = [arm for arm in arms.values() if arm["kind"] == kind]
        held.plot(
            [arm["target"] + 0.008 * (index - 1) for arm in mine for _ in arm["realised"]],
            [value for arm in mine for value in arm["realised"]],
            MARKERS[index], fillstyle="none", **style,
        )  # fmt: skip
        threshold = arms[f"{kind}, 0.3"]["threshold"]
        path.plot(np.arange(len(threshold)) * 20, threshold, **style)
    held.set(
        xlabel="target acceptance",
        ylabel="realised over 2,000 steps",
        title="The target is held (3 seeds each)",
    )
    path.set(xlabel="micro-batches after the burn-in", ylabel="threshold", title="The threshold at target .3")
    held.legend(), path.legend()
    return drawing


def novelty(arms: dict[str, Any]) -> Figure:
    """How far new and returning skills lie from the threshold."""
    drawing = Figure(figsize=(9.0, 3.0 * ((len(arms) + 1) // 2)), layout="constrained")
    panels = drawing.subplots((len(arms) + 1) // 2, 2, squeeze=False).flatten()
    for axes, (name, arm) in zip(panels, arms.items(), strict=False):
        scores, novel = np.concatenate(arm["scores"]), np.concatenate(arm["novel"])
        edges = np.linspace(scores.min(), scores.max(), 40)
        axes.hist(scores[~novel], edges, color=OKABE_ITO[0], alpha=0.8, label="a known skill returns")
        axes.hist(scores[novel], edges, color=OKABE_ITO[1], alpha=0.8, label="a new skill")
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set(xlabel="threshold - similarity", ylabel="segments", yscale="symlog")
        axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axes.minorticks_off()
        axes.set_title(f"{name}\nAUROC {arm['auroc']:.3f}, false spawns {arm['false_spawns']:.1%}")
        axes.legend()
    return drawing


def layer_routing_pareto(table: dict[str, Any]) -> Figure:
    """Test loss against the FLOPs that inference executes, and against its seconds; the frontier and its hypervolume."""
    drawing = Figure(figsize=(8.6, 3.6), layout="constrained")
    task = "evaluation.perplexity_wordmath"
    costs = {
        "share of the FLOPs executed at inference": "training.routing_executed_eval",
        "seconds of the evaluation": f"{task}.seconds",
    }
    for axes, (label, key) in zip(drawing.subplots(1, 2, sharey=True), costs.items(), strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for run in table["runs"]:
            metrics, policy = run["metrics"], run["overrides"]["methods.layer_routing.policy"]
            points.setdefault(policy, []).append((metrics[key], metrics[f"{task}.loss"]))
        for index, (name, own) in enumerate(points.items()):
            axes.plot(*zip(*sorted(own), strict=True), MARKERS[index], color=OKABE_ITO[index], label=name)
        every = [point for own in points.values() for point in own]
        best = sorted(every[i] for i in frontier(every))
        axes.step(*zip(*best, strict=True), where="post", color="#8a8a8a", linewidth=1, zorder=0)
        worst, ideal = (tuple(pick(axis) for axis in zip(*every, strict=True)) for pick in (max, min))
        area = (worst[0] - ideal[0]) * (worst[1] - ideal[1])
        axes.set(xlabel=label, title=f"hypervolume {hypervolume(every, worst) / area:.3f}")
        axes.grid(alpha=0.3)
    first, *_ = drawing.axes
    first.set_ylabel("test loss")
    first.legend(fontsize=8)
    return drawing


FIGURES = {"controller": controller, "novelty": novelty, "layer_routing_pareto": layer_routing_pareto}


def main() -> None:
    for name, draw in FIGURES.items():
        files = sorted(RESULTS.glob(f"{name}*.json"))
        if not files:
            sys.exit(
                f"{RESULTS} holds no {name}*.json: run `headgate bench {name} --json {RESULTS / name}.json`"
            )
        with house_style():
            found = json.loads(files[0].read_text())
            save(draw(found.get("arms", found)), IMAGES, name)


if __name__ == "__main__":
    main()
