"""What every arm spent: seconds, tokens, FLOPs, memory, as medians over seeds."""

from __future__ import annotations

import statistics

from headgate.experiments.report.content import Figure, Panel
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import WIDTH, bars, big, colours, new_panel
from headgate.experiments.report.words import seeds_phrase

COSTS = {
    "seconds": ("Training time", "s"),
    "trained_tokens": ("Tokens trained", ""),
    "flops": ("FLOPs executed", ""),
    "memory_peak": ("Peak memory", "B"),
}


def cost_bars(study: Study) -> Figure | None:
    """Four panels of horizontal bars; an arm without the figure has none, and says so."""
    colour = colours([arm.name for arm in study.arms], study.baseline)
    names = [arm.name for arm in study.arms if any(arm.training(cost) for cost in COSTS)]
    panels = []
    for cost, (title, unit) in COSTS.items():
        found = {arm.name: statistics.median(arm.training(cost)) for arm in study.arms if arm.training(cost)}
        if not any(found.values()):
            continue
        drawing, axes = new_panel((WIDTH, 0.6 + 0.3 * len(names)))
        base = found.get(study.baseline or "")
        texts = {}
        for name in names:
            value = found.get(name)
            texts[name] = "not measured" if value is None else big(value, unit)
            if value and base and name != study.baseline:
                texts[name] += f"  ({value / base:.2f}×)"
        bars(axes, {name: found.get(name) for name in names}, colour, texts)
        axes.set_title(title)
        panels.append(
            Panel(f"cost_{cost}", drawing, f"{title}: {'; '.join(f'{n} {t}' for n, t in texts.items())}.")
        )
    if not panels:
        return None
    against = f" In brackets: times that of {study.baseline}." if study.baseline else ""
    return Figure(
        "Cost",
        f"Medians over seeds of training, {seeds_phrase(study)}.{against} Memory is the peak of the whole process on a "
        "CPU, of allocated memory on a GPU.",
        panels,
    )
