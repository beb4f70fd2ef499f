"""layer_routing: the seed's figures from what was logged, and where depth went: over time, by block, by token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from headgate.experiments.records import Figures
from headgate.experiments.report.content import Block, Figure, Panel, Text, TokenMap
from headgate.experiments.report.figures.bars import bar_panel
from headgate.experiments.report.figures.curves import band_phrase, curve_panel
from headgate.experiments.report.figures.heat import heat_panel
from headgate.experiments.report.figures.pareto import Cost, pareto
from headgate.experiments.report.study import Arm, Study
from headgate.experiments.report.style import MUTED, OKABE_ITO, new_panel, shared_legend
from headgate.experiments.report.words import seeds_phrase

NOT_MEASURED = (
    "Inference speed-up is not measured here: run `headgate bench routing --json {folder}/routing.json`, then this "
    "report again."
)

CROWD_OF_PANELS = 4
"""Arms up to which each has a panel of its loss parts."""
CURVES = [
    ("routing/utilization", "share of blocks asked for", "Utilization"),
    ("routing/executed", "share of blocks", "In training, executed"),
    ("routing/temperature", "temperature", "Gumbel temperature"),
    ("routing/entropy", "gate entropy, normalised", "Gate entropy"),
    ("routing/adaptivity", "I(gate; token), nats", "Adaptivity"),
]


def seed_figures(study: Study) -> list[Block]:
    """All figures of the method, for ``headgate report --figures layer_routing``: those of every page, of all arms
    (convergence, trajectories, final losses, head to head), and the section's own.
    """
    curves = [
        curve_panel(study, study.arms, "eval_loss", "validation loss", "routing_convergence", title="Validation loss"),
        curve_panel(study, study.arms, "loss", "training loss", "routing_training_loss", title="Training loss"),
        bar_panel(study, _by_arm(study, "eval_loss"), "routing_final_loss", "Final validation loss"),
        bar_panel(study, _by_arm(study, "train_loss"), "routing_final_training_loss", "Final training loss"),
        curve_panel(
            study, study.arms, "eval_loss", "validation loss", "routing_head_to_head",
            title="Head to head, by compute", unit="flops",
        ),
    ]  # fmt: skip
    caption = f"{band_phrase(study)} Bars are means over seeds, ticks the seeds. Every arm is shown."
    return [*_figure("Convergence and final losses", caption, curves), *layer_routing(study)]


def layer_routing(study: Study) -> list[Block]:
    """Frontier over depth, speed-up, routers while they train; then where depth went."""
    routed = study.using("layer_routing")
    inside = {name: curve_panel(study, routed, name, label, f"routing_{title.split()[-1].lower()}", title=title)
              for name, label, title in CURVES}  # fmt: skip
    _as_share(inside["routing/utilization"], _targets(routed))
    _as_share(inside["routing/executed"])
    if inside["routing/temperature"] is not None:
        inside["routing/temperature"].drawing.axes[0].set_ylim(bottom=0)
    caption = (
        f"{band_phrase(study)} Dashed: the target utilization. Utilization is what the gates ask for, executed is what "
        "ran, both as shares of all blocks over real tokens."
    )
    return [
        *_frontier(study),
        *_speed_up(study),
        *_figure(
            "Routers while they train",
            caption,
            [*inside.values(), *(_parts(arm, i) for i, arm in enumerate(routed[:CROWD_OF_PANELS]))],
        ),
        *_depth(study, routed),
        *_categories(routed),
    ]


def _figure(title: str, caption: str, panels: Sequence[Panel | None]) -> list[Block]:
    drawn = [panel for panel in panels if panel is not None]
    return [Figure(title, caption, drawn)] if drawn else []


def _by_arm(study: Study, name: str) -> dict[str, list[float]]:
    return {arm.name: arm.training(name) for arm in study.arms}


def _frontier(study: Study) -> list[Block]:
    """Quality against what inference costs: blocks and FLOPs executed on held-out data, and evaluation's seconds."""

    def share(name: str) -> Cost:
        def of(arm: Arm) -> list[float]:
            full = [1.0] if "layer_routing" not in arm.methods and arm.distinct else []
            return arm.training(name) or full

        return of

    costs = {
        "depth": ("share of all blocks that run, held-out data", share("routing_utilization_eval")),
        "executed": ("share of the FLOPs that inference executes", share("routing_executed_eval")),
        "inference_seconds": ("seconds of the evaluation", _evaluation_seconds(study)),
    }
    found = pareto(study, costs, "Accuracy-compute Pareto frontier")
    return [found] if found is not None else []


def _evaluation_seconds(study: Study) -> Cost:
    metric = study.metric

    def of(arm: Arm) -> list[float]:
        if metric is None or metric.path[0] != "evaluation":
            return []
        tasks = [(run.result or {}).get("evaluation", {}).get(metric.path[1], {}) for run in arm.distinct]
        return [task["seconds"] for task in tasks if "seconds" in task]

    return of


def _speed_up(study: Study) -> list[Block]:
    """Bars from a saved ``headgate bench routing`` in the folder; without one, how to get it."""
    for file in sorted(study.folder.glob("*.json")):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.get("name") == "routing" and "ratios" in content:
            break
    else:
        return [Text(NOT_MEASURED.format(folder=study.folder))]
    rows = {k.removesuffix(" realised speed-up"): v for k, v in content["ratios"].items() if "speed-up" in k}
    ideal = {k.removesuffix(" ideal speed-up"): v for k, v in content["ideal"].items()}
    drawing, axes = new_panel((4.4, 0.8 + 0.26 * len(rows)))
    for row, (name, value) in enumerate(rows.items()):
        axes.barh(row, value, color=OKABE_ITO[0], height=0.6)
        axes.plot([ideal[name]] * 2, [row - 0.4, row + 0.4], color=OKABE_ITO[1], linewidth=1.6)
    axes.axvline(1, color=MUTED, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("times the full depth's speed (orange: ideal)")
    axes.set_title("Inference speed-up")
    told = "; ".join(f"{name} {value:.2f} of {ideal[name]:.2f}" for name, value in rows.items())
    where = content["hardware"].get("processor") or ", ".join(content["hardware"].get("gpus", []))
    return _figure(
        "Inference speed-up",
        f"`headgate bench routing` on {where}: medians of interleaved rounds, one process.",
        [Panel("routing_speed_up", drawing, f"Speed-up over full depth, realised of ideal. {told}.")],
    )


def _as_share(panel: Panel | None, targets: Iterable[float] = ()) -> None:
    """From none to all of the depth, with the targets dashed."""
    if panel is not None:
        axes = panel.drawing.axes[0]
        axes.set_ylim(0, 1.05)
        for target in targets:
            axes.axhline(target, color="#8a8a8a", linestyle="--", linewidth=0.8)


def _targets(routed: Sequence[Arm]) -> set[float]:
    """The depths that budgets hold; a penalty, or no budget, has none."""
    options = [run.recipe["methods"]["layer_routing"] for arm in routed for run in arm.distinct]
    return {
        option.get("calibrate_to") or option["target_utilization"]
        for option in options
        if option.get("calibrate_to") or option.get("budget", "lagrangian") in ("lagrangian", "target")
    }


def _parts(arm: Arm, index: int) -> Panel | None:
    """CE, KD and budget of one arm's first run; the task's loss is what is left of the whole."""
    run = arm.distinct[0]
    names = sorted({name for row in run.rows for name in row if name.startswith("loss/")})
    if not names:
        return None
    drawing, axes = new_panel()
    for number, name in enumerate(["loss", *names]):
        steps, values = run.series(name)
        label = "total" if name == "loss" else name.removeprefix("loss/")
        axes.plot(steps, values, color=OKABE_ITO[number % len(OKABE_ITO)], label=label)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss")
    axes.set_title(f"Loss parts of {arm.name}")
    axes.grid(axis="y")
    shared_legend(drawing, axes)
    return Panel(
        f"routing_loss_parts_{index}", drawing, f"Total loss and {', '.join(names)} of {arm.name} over steps."
    )


def _depth(study: Study, routed: Sequence[Arm]) -> list[Block]:
    """How often each routable block ran: at the end by arm, and over time in the first arm."""
    ends = {}
    for arm in routed:
        last = [values[-1] for _, values in (run.series("routing/blocks") for run in arm.distinct) if values]
        if last:
            ends[arm.name] = np.mean(last, axis=0)
    if not ends:
        return []
    shapes = {len(rates) for rates in ends.values()}
    panels = []
    for size in sorted(shapes):
        rows = {name: rates.tolist() for name, rates in ends.items() if len(rates) == size}
        gates = [str(i + 1) for i in range(size)]
        panels.append(
            heat_panel(
                list(rows.values()), list(rows), gates, f"routing_blocks_{size}", "Execution by block",
                label="share of tokens", across="routable unit, from the first", limits=(0, 1),
            )
        )  # fmt: skip
    first = next(arm for arm in routed if arm.name in ends)
    steps, values = first.distinct[0].series("routing/blocks")
    panels.append(
        heat_panel(
            np.array(values).T.tolist(), [str(i + 1) for i in range(len(values[0]))], [f"{s:g}" for s in steps],
            "routing_blocks_over_time", f"Execution over time, {first.name}",
            label="share of tokens", across="optimizer step", limits=(0, 1),
        )
    )  # fmt: skip
    return _figure(
        "Which blocks run",
        f"Share of real tokens for which each routable unit ran, at the last log, means over seeds; "
        f"{seeds_phrase(study)}. Skip rate is one minus this. Over time: the first seed.",
        panels,
    )


def _categories(routed: Sequence[Arm]) -> list[Block]:
    """What ``headgate inspect`` found of an arm's first inspected run: depth by token category."""
    for arm in routed:
        for run in arm.distinct:
            file = run.directory.path / "inspect" / "layer_routing.json"
            if file.exists():
                return _inspected(arm, json.loads(file.read_text()))
    return [Text("Depth by token category: run `headgate inspect` on a routed run, then this report again.")]


def _inspected(arm: Arm, found: Figures) -> list[Block]:
    categories = {name: entry["depth"] for name, entry in found["categories"].items()}
    units = [str(i + 1) for i in range(len(found["adaptivity_nats"]))]
    panels = [
        heat_panel(
            [list(categories.values())], [arm.name], list(categories), "routing_categories", "Depth by token category",
            label="share of blocks", across="category",
        ),
        heat_panel(
            [found["adaptivity_nats"]], [arm.name], units, "routing_information", "I(gate; token) by block",
            label="nats", across="routable unit, from the first",
        ),
    ]  # fmt: skip
    low, high = (pick(d for text in found["texts"] for d in text["depth"]) for pick in (min, max))
    texts = [
        TokenMap(
            f"Depth token by token, from {low:.0%} of the blocks (white) to {high:.0%}",
            text["tokens"],
            [(depth - low) / (high - low or 1) for depth in text["depth"]],
        )
        for text in found["texts"]
    ]
    caption = f"As at inference, {found['tokens']:,} held-out tokens, n = 1 seed: the first inspected run of {arm.name}."
    return [*_figure("Which tokens get depth", caption, panels), *texts]
