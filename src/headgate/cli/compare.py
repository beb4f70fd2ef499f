"""``headgate compare RECIPE``: arms x seeds, paired statistics, the verdict."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from headgate.cli.console import live_console, out
from headgate.cli.options import RecipeArgument, SetOption
from headgate.experiments.compare import Comparison
from headgate.experiments.recipe_file import load_recipe


def compare(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Run every arm at every seed (complete runs are skipped) and say what the difference is."""
    loaded = load_recipe(recipe, overrides or [])
    with live_console() as console:
        comparison = Comparison(loaded, say=console.say, console=console)
        report = comparison.execute()
    out.print(comparison_table(report))
    for line in verdict_lines(report):
        out.print(line)
    out.print(f"run directories: {comparison.folder.parent}")
    out.print(f"comparison: {comparison.folder / 'comparison.json'}")


def comparison_table(report: dict[str, Any]) -> Table:
    """One row an arm: the metric over seeds, the difference from the baseline with its interval, the cost."""
    n = len(report["seeds"])
    table = Table(
        title=f"{report['name']}: {report['metric']} on {report['model']}, {n} seeds", title_justify="left"
    )
    for column in (
        "arm",
        "mean",
        "sd",
        f"vs {report['baseline']} (95%)",
        "verdict",
        "test loss",
        "val loss",
        "steps",
        "tok/s",
        "seconds",
    ):
        table.add_column(column, justify="left" if column in ("arm", "verdict") else "right")
    for name, arm in report["arms"].items():
        contrast = report["contrasts"].get(name)
        if contrast is None:
            difference, words = "-", "baseline"
        elif contrast["t"] is None:
            difference = f"{sum(contrast['differences']) / n:+.4f}"
            words = contrast["verdict"]
        else:
            t = contrast["t"]
            difference, words = f"{t['mean']:+.4f} [{t['low']:+.4f}, {t['high']:+.4f}]", contrast["verdict"]
        cost = arm["cost"]
        seconds = cost["seconds"] or 0
        table.add_row(
            name,
            _mean(arm),
            "-" if arm["sd"] is None else f"{arm['sd']:.4f}",
            difference,
            words,
            "-" if arm["loss"] is None else f"{arm['loss']:.4f}",
            "-" if cost["eval_loss"] is None else f"{cost['eval_loss']:.4f}",
            f"{cost['steps']:.0f}",
            f"{cost['trained_tokens'] / seconds:,.0f}" if seconds else "-",
            f"{seconds:.1f}",
        )
    return table


def _mean(arm: dict[str, Any]) -> str:
    if arm["item_interval"] is None:
        return f"{arm['mean']:.4f}"
    low, high = arm["item_interval"]
    return f"{arm['mean']:.1%} [{low:.1%}, {high:.1%}]"


def verdict_lines(report: dict[str, Any]) -> list[str]:
    """What could have been seen, beside every null, and the tuned values."""
    lines = []
    for name, contrast in report["contrasts"].items():
        if contrast["verdict"].startswith("no detectable") and contrast["detectable"] is not None:
            lines.append(
                f"{name}: {len(report['seeds'])} seeds could have shown a difference of {contrast['detectable']:.4f}"
            )
    for name, arm in report["arms"].items():
        if arm["tuned"]:
            lines.append(f"{name}: {arm['tuned']['key']} tuned to {arm['tuned']['value']:g} on validation")
    return lines
