"""schema_bank: the curriculum as a strip, router entropy, loads, alignment with the tags, orthonormality."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from headgate.experiments.report.content import Block, Figure, Panel, Table, Text
from headgate.experiments.report.figures.heat import heat_panel
from headgate.experiments.report.study import Arm, Run, Study
from headgate.experiments.report.style import OKABE_ITO, new_panel, shared_legend
from headgate.experiments.report.words import seeds_phrase

LAYER = re.compile(r"schema/(\d+)/entropy")


def schema_bank(study: Study) -> list[Block]:
    """Curves by layer over the stages, final loads, and what ``headgate inspect`` found where it was run."""
    banked = study.using("schema_bank")
    layers = sorted({int(found[1]) for arm in banked for run in arm.distinct for found in _layers(run)})
    names = {
        "entropy_normalised": ("entropy of a token, normalised", "Sharpness"),
        "entropy_of_mean_normalised": ("entropy of the mean, normalised", "Balance"),
        "tag_alignment": ("share with the tag in the top-k", "Tag alignment"),
        "orthonormality": ("mean deviation", "Orthonormality"),
    }
    panels = [
        panel
        for name, (label, title) in names.items()
        if (panel := _by_layer(banked, layers, name, label, title)) is not None
    ]
    blocks: list[Block] = []
    if panels:
        blocks.append(
            Figure(
                "The bank through its stages",
                f"Means over {seeds_phrase(study)}, every arm with a bank and every block; names at the top: the stages "
                f"of {banked[0].name}.",
                panels,
            )
        )
    return [*blocks, *_loads(study, banked, layers), *_inspected(banked)]


def _layers(run: Run) -> list[re.Match[str]]:
    return [found for row in run.rows for name in row if (found := LAYER.fullmatch(name))]


def _by_layer(
    banked: Sequence[Arm], layers: Sequence[int], name: str, label: str, title: str
) -> Panel | None:
    """One line an arm and block: the mean over the seeds that logged alike."""
    drawing, axes = new_panel()
    told = []
    for number, (arm, layer) in enumerate((arm, layer) for arm in banked for layer in layers):
        curves = [run.series(f"schema/{layer}/{name}") for run in arm.distinct]
        curves = [curve for curve in curves if curve[0] and curve[0] == curves[0][0]]
        if not curves:
            continue
        mean = np.mean([values for _, values in curves], axis=0)
        line = f"{arm.name}, block {layer}" if len(banked) > 1 else f"block {layer}"
        axes.plot(curves[0][0], mean, color=OKABE_ITO[number % len(OKABE_ITO)], label=line)
        told.append(f"{line} ends at {mean[-1]:.3g}")
    if not told:
        return None
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.margins(y=0.15)
    axes.grid(axis="y")
    shared_legend(drawing, axes)
    _stage_strip(axes, banked)
    return Panel(f"schema_{name}", drawing, f"{title}, {label}: {'; '.join(told)}.")


def _stage_strip(axes: Axes, banked: Sequence[Arm]) -> None:
    """Stages of the first arm's first run, named at the top of the axes."""
    steps, stages = banked[0].distinct[0].series("stage")
    starts = [i for i in range(len(stages)) if i == 0 or stages[i] != stages[i - 1]]
    for i in starts:
        if i:
            axes.axvline(steps[i - 1], color="#b5b5b5", linewidth=0.8)
        left = 0.0 if i == 0 else steps[i - 1]
        axes.annotate(
            stages[i],
            (left, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            fontsize=7,
            color="#595959",
        )


def _loads(study: Study, banked: Sequence[Arm], layers: Sequence[int]) -> list[Block]:
    rows: dict[int, dict[str, list[float]]] = {}
    for arm in banked:
        for layer in layers:
            ends = [
                values[-1] for _, values in (r.series(f"schema/{layer}/load") for r in arm.distinct) if values
            ]
            if ends:
                # schemas have no order in common between seeds: sorted loads can be averaged, single ones cannot
                mean = np.mean([sorted(load, reverse=True) for load in ends], axis=0).tolist()
                rows.setdefault(len(mean), {})[f"{arm.name}, block {layer}"] = mean
    if not rows:
        return []
    panels = [
        heat_panel(
            list(found.values()),
            list(found),
            [str(i + 1) for i in range(size)],
            f"schema_load_{size}",
            "Load, largest first",
            label="share of the gate mass",
            across="schema, by load",
        )
        for size, found in rows.items()
    ]
    caption = (
        f"Share of the gate mass at the last log, {seeds_phrase(study)}; sorted within a seed, then averaged."
    )
    return [Figure("How evenly the schemas are used", caption, panels)]


def _inspected(banked: Sequence[Arm]) -> list[Block]:
    rows = []
    for arm in banked:
        for seed, run in arm.runs.items():
            file = run.directory.path / "inspect" / "schema_bank.json"
            for block in json.loads(file.read_text())["blocks"] if file.exists() else []:
                found = [block[name] for name in ("nmi", "alignment", "reuse")]
                told = ["–" if value is None else f"{value:.2f}" for value in found]
                rows.append([arm.name, str(seed), str(block["block"]), str(len(block["dead"])), *told])
    if not rows:
        return [
            Text("Which tokens a schema serves: run `headgate inspect` on a run, then this report again.")
        ]
    caption = (
        "What `headgate inspect` found: NMI of tag and dominant schema, alignment, reuse between paraphrases"
    )
    columns = ["arm", "seed", "block", "dead", "NMI", "alignment", "reuse"]
    return [Table(caption, columns, rows, (1, 2, 3, 4, 5, 6))]
