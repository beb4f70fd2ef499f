"""A comparison as Markdown: the form in which EXPERIMENTS.md keeps it."""

from __future__ import annotations

from collections.abc import Mapping

from headgate.evaluation import continual
from headgate.experiments.records import ComparisonTable, Figures
from headgate.experiments.tuning import ADVICE, on_edge, tuned_to


def markdown(report: ComparisonTable) -> str:
    """Table of arms with intervals and verdicts, then what could have been seen, then the tuned values."""
    seeds, baseline = report["seeds"], report["baseline"]
    better = "higher" if report["higher_is_better"] else "lower"
    lines = [
        f"`{report['metric']}` on `{report['model']}`, seeds {', '.join(map(str, seeds))}; {better} is better.",
        "",
        f"| arm | mean | SD | difference from {baseline} [95% t] | bootstrap [95%] | Holm p | verdict | steps | trained tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        contrast, cost = report["contrasts"].get(name), arm["cost"]
        cells = [name, f"{arm['mean']:.4f}", "-" if arm["sd"] is None else f"{arm['sd']:.4f}"]
        if contrast is None:
            cells += ["-", "-", "-", "baseline"]
        else:
            cells += [_interval(contrast["t"]), _interval(contrast.get("bootstrap"))]
            cells += ["-" if contrast["holm_p"] is None else f"{contrast['holm_p']:.3g}", contrast["verdict"]]
        seconds = cost["seconds"] or 0.0
        cells += [f"{cost['steps']:.0f}", f"{cost['trained_tokens']:,.0f}", f"{seconds:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, arm in report["arms"].items():
        if not arm.get("verified", True):
            lines.append(f"- {name}: **not verified**: what was saved is not what is reported here.")
    for name, contrast in report["contrasts"].items():
        if contrast["detectable"] is not None and contrast["verdict"].startswith("no detectable"):
            lines.append(
                f"- {name}: {len(seeds)} seeds with this spread could have shown {contrast['detectable']:.4f}."
            )
    if report["pairs"]:
        lines += [
            "",
            "| contrast | difference [95% t] | Holm p | could have been seen | verdict |",
            "|---|---|---|---|---|",
        ]
    for name, pair in report["pairs"].items():
        seen = "-" if pair["detectable"] is None else f"{pair['detectable']:.4f}"
        p = "-" if pair["holm_p"] is None else f"{pair['holm_p']:.3g}"
        lines.append(f"| {name} | {_interval(pair['t'])} | {p} | {seen} | {pair['verdict']} |")
    if report["pairs"]:
        lines.append("")
    lines += _streams(
        {name: found for name, arm in report["arms"].items() if (found := arm.get("continual"))}
    )
    tuned = {name: arm["tuned"] for name, arm in report["arms"].items() if arm["tuned"]}
    if tuned:
        key = next(iter(tuned.values()))["key"]
        lines.append(
            f"- `{key}` tuned on validation, alike: "
            + ", ".join(f"{n} {tuned_to(t)}" for n, t in tuned.items())
            + "."
        )
        if any(on_edge(t) for t in tuned.values()):
            lines.append(f"- {ADVICE[0].upper()}{ADVICE[1:]}.")
    for name, arm in report["arms"].items():
        if arm["equal_time"]:
            lines.append(
                f"- {name}: {arm['equal_time']['steps']} steps, as many as fit in the {arm['equal_time']['seconds']:.1f} s of {arm['equal_time']['of']}."
            )
    return "\n".join(lines) + "\n"


def _streams(arms: Mapping[str, Figures]) -> list[str]:
    """Of a stream: every skill's loss at its end, the average, what was lost and gained; means over seeds."""
    if not arms:
        return []
    skills = list(
        dict.fromkeys(skill for arm in arms.values() for skill in arm["skills"])
    )  # arms may differ in theirs
    columns = ["arm", *skills, "average", "backward transfer", "forgetting", "forward transfer"]
    columns += ["TRACE's backward transfer", "general change"]
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, arm in arms.items():
        losses = [arm["skills"].get(skill) for skill in skills] + [arm["average"]]
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        moved = (arm.get(key) for key in continual.FIGURES[1:])
        cells += ["-" if value is None else f"{value:+.3f}" for value in moved]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return [*lines, ""]


def _interval(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
