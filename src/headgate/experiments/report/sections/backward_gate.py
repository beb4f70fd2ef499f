"""backward_gate: loss against accepted steps, tokens and seconds; acceptance and threshold; the seed's pass bar."""

from __future__ import annotations

import statistics

import numpy as np

from headgate.experiments.report.content import Block, Figure, Panel, Table, Text
from headgate.experiments.report.figures.curves import band_phrase, curve_panel
from headgate.experiments.report.study import Arm, Run, Study, Unit

LOSS_ROOM, FEWER_STEPS = 0.005, 0.30
"""The seed's pass bar: validation loss within +0.5% of the baseline at 30% fewer accepted steps."""


def backward_gate(study: Study) -> list[Block]:
    """Figures of the gated arms beside the baseline, and the pass bar where there is one to compare with."""
    gated = study.using("backward_gate")
    beside = [arm for arm in study.arms if arm in gated or arm.name == study.baseline]
    units: list[tuple[Unit, str]] = [
        ("accepted", "accepted"),
        ("tokens", "tokens"),
        ("seconds", "seconds"),
        ("flops", "flops"),
    ]
    panels = [
        curve_panel(study, beside, "eval_loss", "validation loss", f"gate_loss_{name}", unit=unit)
        for unit, name in units
    ]
    blocks: list[Block] = []
    if any(panels):
        blocks.append(
            Figure(
                "What the accepted batches bought",
                f"Validation loss, {band_phrase(study)} An arm without a gate accepts every micro-batch.",
                [panel for panel in panels if panel is not None],
            )
        )
    inside = [
        _acceptance(study, gated),
        curve_panel(study, gated, "gate/threshold", "threshold", "gate_threshold", title="Threshold"),
        curve_panel(
            study, gated, "gate/novelty", "gradient novelty", "gate_novelty", title="Gradient novelty"
        ),
        curve_panel(
            study, gated, "gate/loss_all", "training loss, all batches", "gate_loss_all", title="All batches"
        ),
    ]
    if any(inside):
        blocks.append(
            Figure(
                "The gate at work",
                f"{band_phrase(study)} Dashed: the target acceptance. Training loss counts rejected batches too.",
                [panel for panel in inside if panel is not None],
            )
        )
    return [*blocks, *_pass_bar(study, gated)]


def _acceptance(study: Study, gated: list[Arm]) -> Panel | None:
    panel = curve_panel(
        study, gated, "gate/acceptance_rate", "accepted so far", "gate_acceptance", title="Acceptance"
    )
    if panel is not None:
        axes = panel.drawing.axes[0]
        axes.set_ylim(0, 1.05)
        for target in {_target(run) for arm in gated for run in arm.distinct}:
            axes.axhline(target, color="#8a8a8a", linestyle="--", linewidth=0.8)
    return panel


def _target(run: Run) -> float:
    return float(run.recipe["methods"]["backward_gate"]["target_acceptance"])


def _steps_saved(run: Run, base: Run) -> float:
    """Share of the batches that had no backward; of trained sequences packed anew, against the baseline's steps."""
    mine = run.training
    if run.recipe["methods"]["backward_gate"].get("granularity") == "sequence":
        return 1 - float(mine["steps"]) / float(base.training["steps"])
    return 1 - float(mine["accepted"]) / float(mine["offered"])


def _pass_bar(study: Study, gated: list[Arm]) -> list[Block]:
    """Loss and accepted steps against the baseline's, mean over paired seeds; time to a common loss."""
    base = study.arm(study.baseline) if study.baseline is not None else None
    if base is None or base in gated or not base.training("eval_loss"):
        return [Text("The pass bar needs an ungated baseline that trained: none is here.")]
    rows = []
    for arm in gated:
        seeds = [s for s in arm.runs if s in base.runs and "eval_loss" in arm.runs[s].training]
        if not seeds:
            continue
        mine, theirs = ([a.runs[s].training for s in seeds] for a in (arm, base))
        loss = statistics.fmean(
            m["eval_loss"] / t["eval_loss"] - 1 for m, t in zip(mine, theirs, strict=True)
        )
        fewer = statistics.fmean(_steps_saved(arm.runs[s], base.runs[s]) for s in seeds)
        passed = loss <= LOSS_ROOM and fewer >= FEWER_STEPS
        target = max(r["eval_loss"] for r in (*mine, *theirs))
        times = [_seconds_to(a, seeds, target) for a in (arm, base)]
        told = [f"{t:.1f}" if t is not None else "not reached" for t in times]
        rows.append(
            [
                arm.name,
                f"{loss:+.1%}",
                f"{fewer:.1%}",
                "passes" if passed else "fails",
                f"{target:.4f}",
                *told,
            ]
        )
    if not rows:
        return []
    caption = (
        f"The seed's pass bar: validation loss within +{LOSS_ROOM:.1%} of {base.name} at {FEWER_STEPS:.0%} fewer "
        "accepted steps, means over paired seeds; and seconds of training to the loss that every run reached"
    )
    columns = [
        "arm",
        "validation loss",
        "steps saved",
        "pass bar",
        "loss",
        "seconds",
        f"seconds, {base.name}",
    ]
    return [Table(caption, columns, [[c.replace("-", "−") for c in row] for row in rows], (1, 2, 4, 5, 6))]


def _seconds_to(arm: Arm, seeds: list[int], loss: float) -> float | None:
    """Mean training seconds at which the validation loss first was ``loss``, between evaluations in proportion."""
    found = []
    for seed in seeds:
        steps, values = arm.runs[seed].series("eval_loss")
        below = [i for i, value in enumerate(values) if value <= loss]
        if not below:
            return None
        i, seconds = below[0], arm.runs[seed].clock(steps, "seconds")
        if i == 0:
            found.append(seconds[0])
        else:
            found.append(float(np.interp(-loss, [-values[i - 1], -values[i]], seconds[i - 1 : i + 1])))
    return statistics.fmean(found)
