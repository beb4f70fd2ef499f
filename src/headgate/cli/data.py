"""``headgate data RECIPE``: rows as they are trained, and what preparation counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from headgate.cli.console import err, out
from headgate.cli.options import RecipeArgument, SetOption, read_recipe
from headgate.experiments.paths import with_paths

if TYPE_CHECKING:
    from headgate.data.report import DataReport
    from headgate.data.shown import ShownRow


def data(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    rows: Annotated[int, typer.Option(help="Rows of each source to print.")] = 2,
    limit: Annotated[int, typer.Option(help="Count over the first rows of each source; 0: all.")] = 1000,
) -> None:
    """Print rows as they are trained: masked tokens dim (or outside « »), lengths, truncation, padding, the mix."""
    loaded = with_paths(read_recipe(recipe, overrides))
    from headgate.data.shown import shown_sources
    from headgate.data.tokenizers import tokenizer_of
    from headgate.experiments.model_outline import context_length

    tokenizer = tokenizer_of(loaded.model.name_or_path, loaded.model.revision)
    context = context_length(loaded)
    for source in shown_sources(
        loaded.data, tokenizer, rows=rows, limit=limit or None, context_length=context
    ):
        share = "" if source.share is None else f", {source.share:.1%} of the rows drawn"
        out.print(f"{source.key}: {source.name}{share}", style="bold", markup=False)
        for row in source.rows:
            _print_row(row)
        _print_report(source.report)


def _print_row(row: ShownRow) -> None:
    cut = ", cut" if row.truncated else ""
    out.print(f"-- {row.example_id}: {row.length} tokens, {row.trained} trained{cut}", markup=False)
    text = Text()
    for content, trained in row.runs:
        if out.is_terminal:
            text.append(content, style="" if trained else "dim")
        else:
            text.append(f"«{content}»" if trained else content)
    out.print(text)


def _print_report(report: DataReport) -> None:
    out.print(f"   {report}", markup=False)
    share = report.trained_tokens / max(report.tokens, 1)
    lengths = ", ".join(f"to {end}: {count}" for end, count in report.length_histogram.items())
    out.print(
        f"   {share:.1%} of the tokens are trained; rows by length {lengths}; {report.masks_checked} masks decoded and "
        "compared with their source",
        markup=False,
    )
    for note in report.notes:
        err.print(f"[yellow]note:[/yellow] {note}")
