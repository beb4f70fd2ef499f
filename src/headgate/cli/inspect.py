"""``headgate inspect RUN``: what the routers, schemas and experts of a run learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headgate.cli.console import out
from headgate.errors import ConfigError
from headgate.evaluation.predictions import Figures
from headgate.experiments.inspection import inspect_oracle, inspect_run
from headgate.experiments.rank_sweep import rank_sweeps
from headgate.experiments.run_directory import RunDirectory


def inspect(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="A finished run directory, or a sweep over a rank; several with --oracle.",
            show_default=False,
        ),
    ],
    limit: Annotated[int, typer.Option(help="Examples to look at.")] = 200,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="What a choice per token would gain: among these runs, or among all masks of one run's depth.",
        ),
    ] = False,
) -> None:
    """Say what each schema does, which tokens get depth, how alike experts are; tables (JSON) and a figure (PNG, SVG) are written beside the run.

    Of a sweep over a rank: the law L = L_inf + a r^-b that its losses follow, and the rank to try next.
    """
    if oracle:
        _oracle(inspect_oracle([RunDirectory(run) for run in runs], limit=limit))
        return
    if len(runs) > 1:
        raise ConfigError(f"{len(runs)} runs given: inspect looks into one, or into several with --oracle")
    (run,) = runs
    if (run / "sweep.json").exists():
        _rank_laws(run)
        return
    for name, path in inspect_run(RunDirectory(run), limit=limit).items():
        found = json.loads(path.read_text())
        if name in TABLES:  # another package's inspector has its tables in the file
            TABLES[name](found)
        files = [path, *(p for p in (path.with_suffix(".png"), path.with_suffix(".svg")) if p.exists())]
        out.print(f"written: {', '.join(map(str, files))}", markup=False)


def _oracle(path: Path) -> None:
    gains = json.loads(path.read_text())
    table = Table(title=f"one mask for all {gains['tokens']:,} tokens", title_justify="left")
    for column in ("mask", "depth", "loss"):
        table.add_column(column, justify="left" if column == "mask" else "right")
    for mask in sorted(gains["masks"], key=lambda mask: mask["loss"])[:8]:
        table.add_row(mask["name"], f"{mask['depth']:.1%}", f"{mask['loss']:.4f}")
    out.print(table)
    for name, value, against in (
        ("per document, by its own losses (a bound)", "document", "single"),
        ("per token, by its own loss (a bound: luck included)", "token", "single"),
        ("per document, by its first 16 tokens, on the rest", "prefix", "single_after"),
    ):
        gain = gains[against] - gains[value]
        out.print(
            f"{name}: {gains[value]:.4f}, {gain:+.4f} nats against the best single mask there", markup=False
        )
    out.print(f"written: {path}", markup=False)


def _rank_laws(folder: Path) -> None:
    for found in rank_sweeps(folder):
        law, proposal = found.law, found.proposal
        table = Table(title=f"{found.metric} by {found.key} {found.others}".rstrip(), title_justify="left")
        for column in ("rank", "loss", "law"):
            table.add_column(column, justify="right")
        for rank, loss in sorted(zip(found.ranks, found.losses, strict=True)):
            table.add_row(str(rank), f"{loss:.4f}", f"{law.loss(rank):.4f}")
        out.print(table)
        out.print(
            f"L(r) = {law.floor:.4f} + {law.scale:.4f} r^-{law.exponent:.2f}, residuals {law.error:.1e}"
            + (" (three ranks: fitted exactly, nothing is tested)" if len(set(found.ranks)) == 3 else "")
        )
        told = (
            f"rank {proposal.rank} is enough: doubling it"
            if proposal.tested
            else f"try rank {proposal.rank} next: doubling that"
        )
        out.print(f"{told} would gain {proposal.gain:.1%}")


def _schemas(found: Figures) -> None:
    for block in found["blocks"]:
        told = [f"block {block['block']}", f"{len(block['dead'])} dead of {len(block['load'])}"]
        for field in ("nmi", "alignment", "reuse"):
            if block[field] is not None:
                told.append(f"{field} {block[field]:.2f}")
        table = Table(title=f"schema_bank: {', '.join(told)}", title_justify="left")
        for column in ("schema", "load", "top tokens (mean gate)", "top examples"):
            table.add_column(column, justify="right" if column in ("schema", "load") else "left")
        order = sorted(range(len(block["load"])), key=lambda s: -block["load"][s])
        for schema in order[:8]:
            tokens = "  ".join(f"{token!r} {weight:.2f}" for token, weight in block["top_tokens"][schema][:6])
            examples = ", ".join(str(index) for index, _ in block["top_examples"][schema])
            table.add_row(str(schema), f"{block['load'][schema]:.1%}", tokens, examples)
        out.print(table)


def _depth(found: Figures) -> None:
    title = f"layer_routing: {found['utilization']:.1%} of the blocks over {found['tokens']:,} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("token category", "tokens", "blocks that ran"):
        table.add_column(column, justify="left" if column == "token category" else "right")
    for category, entry in found["categories"].items():
        table.add_row(category, f"{entry['tokens']:,}", f"{entry['depth']:.1%}")
    out.print(table)
    rates = ", ".join(f"{rate:.0%}" for rate in found["open_rate"])
    nats = ", ".join(f"{value:.3f}" for value in found["adaptivity_nats"])
    out.print(f"open rate of each routable unit: {rates}")
    out.print(f"I(gate; token) of each, nats: {nats}")


def _experts(found: Figures) -> None:
    experts = found["experts"]
    table = Table(
        title=f"lora_experts: {len(experts)} experts, cosine of their updates", title_justify="left"
    )
    numbers = [str(row["expert"]) for row in experts]
    for column in ("expert", "skills", "rank", "tokens served", *numbers):
        table.add_column(column, justify="left" if column == "skills" else "right")
    for row, line in zip(experts, found["cosines"], strict=True):
        served = f"{row['served_tokens'] or 0:,.0f}"
        told = [f"{value:.2f}" for value in line]
        table.add_row(str(row["expert"]), ", ".join(row["skills"]), str(row["rank"]), served, *told)
    out.print(table)
    for join in found["joins"]:
        out.print(
            f"merge_above up to {join['cosine']:.3f} merges experts {', '.join(map(str, join['experts']))}"
        )


TABLES = {"schema_bank": _schemas, "layer_routing": _depth, "lora_experts": _experts}
