"""``headgate eval A B --paired``: McNemar, a bootstrap interval over items, and the flips with their text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headgate.data.readers.base import RawRow
from headgate.evaluation.paired import flips, pair
from headgate.experiments.records import Figures
from headgate.experiments.statistics import crossed_bootstrap, detectable_over_items, mcnemar


def paired_report(a: Sequence[RawRow], b: Sequence[RawRow]) -> Figures:
    """How ``b`` differs from ``a`` on the same items. Raises DataError when the items differ.

    Right-or-wrong items get the exact McNemar test, and beside a null the smallest difference that this many
    items could have shown; items with a loss are compared by its difference, token-weighting left aside.
    """
    pairs = pair(a, b)
    judged = all("correct" in p.a and "correct" in p.b for p in pairs)
    name = "correct" if judged else "loss"
    one = np.array([float(p.a[name]) for p in pairs])
    two = np.array([float(p.b[name]) for p in pairs])
    interval = crossed_bootstrap((two - one)[None, :])
    report: Figures = {
        "metric": "accuracy" if judged else "loss",
        "items": len(pairs),
        "a": float(one.mean()),
        "b": float(two.mean()),
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }
    if judged and set(one) | set(two) <= {0.0, 1.0}:
        turned = flips(pairs)
        discordance = (len(turned["gained"]) + len(turned["lost"])) / len(pairs)
        report["p"] = mcnemar([bool(x) for x in one], [bool(x) for x in two])
        report["gained"], report["lost"] = len(turned["gained"]), len(turned["lost"])
        report["detectable"] = detectable_over_items(discordance, len(pairs)) if discordance else None
        report["flips"] = {
            kind: [
                {
                    "id": p.id,
                    "prompt": p.prompt,
                    "gold": p.gold,
                    "a": p.a.get("output"),
                    "b": p.b.get("output"),
                }
                for p in found
            ]
            for kind, found in turned.items()
        }
    else:
        report["p"] = interval.p
    return report


def paired_lines(report: Figures, names: tuple[str, str], examples: int = 3) -> list[str]:
    """The report in words, with a few flips."""
    lines = [
        f"{names[0]}: {report['a']:.4f}   {names[1]}: {report['b']:.4f}   ({report['metric']}, {report['items']} items)",
        f"difference {report['difference']:+.4f}, 95% bootstrap interval over items "
        f"[{report['low']:+.4f}, {report['high']:+.4f}]",
    ]
    if "gained" not in report:
        return [*lines, f"bootstrap p = {report['p']:.4f}"]
    lines.append(f"gained {report['gained']}, lost {report['lost']}; exact McNemar p = {report['p']:.4f}")
    if report["p"] >= 0.05:
        seen = report["detectable"]
        lines.append(
            "no detectable difference: no item flipped"
            if seen is None
            else f"no detectable difference; this many items could have shown {seen:.4f}"
        )
    for kind in ("gained", "lost"):
        for flip in report["flips"][kind][:examples]:
            lines += [
                "",
                f"{kind}: {flip['id']} (gold {flip['gold']})",
                f"  prompt: {_short(flip['prompt'])}",
                f"  {names[0]}: {_short(flip['a'])}",
                f"  {names[1]}: {_short(flip['b'])}",
            ]
    return lines


def _short(text: str | None) -> str:
    flat = " ".join(str(text or "").split())
    return flat if len(flat) <= 200 else flat[:197] + "..."
