"""``headgate compare RECIPE``: arms x seeds, paired statistics, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from headgate.cli.console import live_console, out
from headgate.cli.options import (
    DataOption,
    ExecutorOption,
    LiveOption,
    MethodsOption,
    ModelOption,
    OptionalRecipe,
    SetOption,
    WorkersOption,
    chosen_recipe,
    executor_options,
)
from headgate.errors import ConfigError
from headgate.experiments.evidence import Finding, findings
from headgate.experiments.recipe import Recipe
from headgate.experiments.tuning import ADVICE, on_edge, tuned_to

if TYPE_CHECKING:
    from headgate.experiments.compare import Comparison
    from headgate.experiments.executors import Executor
    from headgate.experiments.records import ArmRow, ComparisonTable


def compare(
    recipe: OptionalRecipe = None,
    overrides: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    methods: MethodsOption = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="local, ray or slurm. Without one, and without --workers: one run after the other."
        ),
    ] = None,
    workers: WorkersOption = None,
    option: ExecutorOption = None,
    live: LiveOption = False,
    allow_unverified: Annotated[
        bool,
        typer.Option(
            "--allow-unverified", help="Judge runs that are not what they report; the table says so."
        ),
    ] = False,
) -> None:
    """Run every arm at every seed (complete runs are skipped) and say what the difference is; in every cell of a map."""
    loaded = chosen_recipe(recipe, model, data, methods, overrides or [])
    # after the recipe and its arms: a typo is told before torch is imported
    from headgate.experiments.compare import Comparison
    from headgate.experiments.executors import make_executor
    from headgate.experiments.report.live import followed

    parallel = executor is not None or workers is not None
    if option and not parallel:
        raise ConfigError(f"--option {option[0]}: it is an executor's: name one with --executor")
    made = make_executor(executor or "local", workers, executor_options(option or [])) if parallel else None
    if loaded.compare is not None and loaded.compare.map is not None:
        _compare_map(loaded, made, live, allow_unverified)
        return
    with live_console() as console:
        comparison = Comparison(
            loaded, say=console.say, console=console, executor=made, allow_unverified=allow_unverified
        )
        with followed(comparison.folder, live) as page:
            report = comparison.execute()
            _show(comparison, report)
            out.print(f"report: {page()}")


def _show(comparison: Comparison, report: ComparisonTable) -> None:
    out.print(comparison_table(report))
    for line in verdict_lines(report):
        out.print(line)
    from headgate.experiments.statistics import MINIMUM_SEEDS

    if len(report["seeds"]) < MINIMUM_SEEDS:
        compared = {name for arm in comparison.arms.values() for name in arm.methods}
        if shipped := findings(compared):
            out.print(evidence_table(shipped))
    out.print(f"run directories: {comparison.folder.parent}")
    out.print(f"comparison: {comparison.folder / 'comparison.json'}")


def _compare_map(recipe: Recipe, executor: Executor | None, live: bool, allow_unverified: bool) -> None:
    """The comparison in every cell. All cells are checked before the first one runs."""
    from headgate.experiments.compare import Comparison
    from headgate.experiments.compare_map import cells, map_folder
    from headgate.experiments.report import write_report
    from headgate.experiments.report.live import followed

    with live_console() as console:
        found = [
            Comparison(cell, console.say, console, executor, allow_unverified) for cell in list(cells(recipe))
        ]
        for number, comparison in enumerate(found, start=1):
            console.say(f"cell {number} of {len(found)}: {comparison.recipe.name}")
            with followed(comparison.folder, live) as page:
                report = comparison.execute()
                page()
            for name, contrast in report["contrasts"].items():
                console.say(f"{report['name']}: {name}: {contrast['verdict']}")
    written = write_report(map_folder(recipe))
    out.print(f"map: {map_folder(recipe)}")
    out.print(f"report: {written.page}")


def comparison_table(report: ComparisonTable) -> Table:
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
        seconds, tokens = cost["seconds"] or 0, cost["trained_tokens"]
        table.add_row(
            name,
            _mean(arm),
            "-" if arm["sd"] is None else f"{arm['sd']:.4f}",
            difference,
            words,
            "-" if arm["loss"] is None else f"{arm['loss']:.4f}",
            "-" if cost["eval_loss"] is None else f"{cost['eval_loss']:.4f}",
            f"{cost['steps']:.0f}",
            "-" if not seconds or tokens is None else f"{tokens / seconds:,.0f}",
            f"{seconds:.1f}",
        )
    return table


def evidence_table(shipped: Sequence[Finding]) -> Table:
    """What Headgate's own comparisons of three seeds or more found: shown where a comparison has fewer."""
    table = Table(title="what comparisons with more seeds found (EXPERIMENTS.md)", title_justify="left")
    for column in ("method", "question", "difference (95%)", "seeds", "model", "verdict"):
        table.add_column(column)
    for row in shipped:
        table.add_row(row.method, row.question, row.difference, str(row.seeds), row.model, row.verdict)
    return table


def _mean(arm: ArmRow) -> str:
    if arm["item_interval"] is None:
        return f"{arm['mean']:.4f}"
    low, high = arm["item_interval"]
    return f"{arm['mean']:.1%} [{low:.1%}, {high:.1%}]"


def verdict_lines(report: ComparisonTable) -> list[str]:
    """What is not verified; what could have been seen, beside every null; and the tuned values."""
    lines = [
        f"{name}: NOT VERIFIED: what was saved is not what is reported here (headgate verify)"
        for name, arm in report["arms"].items()
        if not arm["verified"]
    ]
    for name, contrast in report["contrasts"].items():
        if contrast["verdict"].startswith("no detectable") and contrast["detectable"] is not None:
            lines.append(
                f"{name}: {len(report['seeds'])} seeds could have shown a difference of {contrast['detectable']:.4f}"
            )
    for name, pair in report["pairs"].items():
        t = pair["t"]
        interval = f" {t['mean']:+.4f} [{t['low']:+.4f}, {t['high']:+.4f}]" if t else ""
        lines.append(f"{name}:{interval} {pair['verdict']}")
    for name, arm in report["arms"].items():
        if arm["tuned"]:
            lines.append(f"{name}: {arm['tuned']['key']} tuned to {tuned_to(arm['tuned'])} on validation")
    if any(arm["tuned"] and on_edge(arm["tuned"]) for arm in report["arms"].values()):
        lines.append(ADVICE)
    return lines
