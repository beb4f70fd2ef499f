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
    drawing = Figure(figsize=(9.0, 3.4 * ((len(arms) + 1) // 2)))
    panels = drawing.subplots((len(arms) + 1) // 2, 2, squeeze=False).flatten()
    for axes, (name, arm) in zip(panels, arms.items(), strict=False):
        scores, novel = np.concatenate(arm["scores"]), np.concatenate(arm["novel"])
        edges = np.linspace(scores.min(), scores.max(), 40)
        axes.hist(scores[~novel], edges, color=OKABE_ITO[0], alpha=0.8, label="a known skill returns")
        axes.hist(scores[novel], edges, color=OKABE_ITO[1], alpha=0.8, label="a new skill")
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set(xlabel="threshold - similarity", ylabel="segments", yscale="symlog")
        axes.set_title(f"{name}: AUROC {arm['auroc']:.3f}, false spawns {arm['false_spawns']:.1%}")
        axes.legend()
    return drawing


def layer_routing_pareto(table: dict[str, Any]) -> Figure:
    """Test loss against the share of all blocks that the target allows, a line a policy."""
    drawing = Figure(figsize=(4.6, 3.4))
    axes = drawing.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in table["runs"]:
        key = run["overrides"]["methods.layer_routing.target_utilization"]
        loss = run["metrics"]["evaluation.perplexity_wordmath.loss"]
        lines.setdefault(run["overrides"]["methods.layer_routing.policy"], []).append((key, loss))
    for index, (name, points) in enumerate(lines.items()):
        style = {"color": OKABE_ITO[index], "marker": MARKERS[index]}
        axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
    axes.set(xlabel="target share of all blocks", ylabel="test loss", title="Loss against depth (one seed)")
    axes.legend()
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
