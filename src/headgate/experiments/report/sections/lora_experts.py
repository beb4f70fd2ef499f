"""lora_experts: experts over time, who serves the tokens, and why each expert was made."""

from __future__ import annotations

from headgate.experiments.report.content import Block, Figure, Panel, Table
from headgate.experiments.report.figures.curves import band_phrase, curve_panel
from headgate.experiments.report.study import Arm, Study
from headgate.experiments.report.style import OKABE_ITO, new_panel, shared_legend, short_name

SHOWN = 4
"""Arms up to which each has panels by expert."""
USAGE, MATURITY = "expert_usage_", "experts/maturity_"


def lora_experts(study: Study) -> list[Block]:
    """Curves of what was logged; the task x time matrix is the continual section's."""
    arms = study.using("lora_experts")
    panels = [
        curve_panel(study, arms, "experts/count", "experts", "experts_count", title="Experts"),
        curve_panel(
            study, arms, "routing_entropy", "entropy, nats", "experts_entropy", title="Routing entropy"
        ),
        curve_panel(
            study, arms, "experts/temperature", "temperature", "experts_temperature", title="Temperature"
        ),
        curve_panel(
            study, arms, "experts/drop_share", "share of tokens", "experts_drop", title="Dropped by capacity"
        ),
        *[
            _by_expert(arm, USAGE, "share of the gates", "usage", index)
            for index, arm in enumerate(arms[:SHOWN])
        ],
        *[_by_expert(arm, MATURITY, "maturity", "maturity", index) for index, arm in enumerate(arms[:SHOWN])],
    ]
    drawn = [panel for panel in panels if panel is not None]
    blocks: list[Block] = []
    if drawn:
        caption = f"{band_phrase(study)} By expert: the first seed, since experts have no order in common between seeds."
        blocks.append(Figure("Experts over time", caption, drawn))
    return [*blocks, *_decisions(arms)]


def _by_expert(arm: Arm, prefix: str, label: str, what: str, index: int) -> Panel | None:
    """One telemetry name an expert, in the first run; an expert that is not there yet has no line."""
    run = arm.distinct[0]
    names = dict.fromkeys(name for row in run.rows for name in row if name.startswith(prefix))
    found = {
        name.removeprefix(prefix): run.series(name) for name in names if not name.endswith("_dispatched")
    }
    if not found:
        return None
    drawing, axes = new_panel()
    for number, (name, (steps, values)) in enumerate(found.items()):
        axes.plot(steps, values, color=OKABE_ITO[number % len(OKABE_ITO)], label=name)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    axes.set_title(f"{what.capitalize()}, {short_name(arm.name)}")
    axes.grid(axis="y")
    shared_legend(drawing, axes)
    ends = ", ".join(f"{name} {values[-1]:.2f}" for name, (_, values) in found.items())
    return Panel(
        f"experts_{what}_{index}", drawing, f"{what.capitalize()} by expert over steps; at the end: {ends}."
    )


def _decisions(arms: list[Arm]) -> list[Block]:
    """Why each expert was made or reused, with the similarity and the threshold it was held against."""
    rows = []
    for arm in arms:
        for seed, run in arm.runs.items():
            for found in run.training.get("expert_decisions") or []:
                numbers = [found.get(name) for name in ("similarity", "threshold")]
                told = [f"{n:.3f}" if isinstance(n, (int, float)) else "–" for n in numbers]
                rows.append(
                    [arm.name, str(seed), *(str(found.get(n, "–")) for n in ("step", "skill", "kind")), *told]
                )
    if not rows:
        return []
    columns = ["arm", "seed", "step", "skill", "decision", "similarity", "threshold"]
    return [Table("Decisions on new skills", columns, rows, (1, 2, 5, 6))]
