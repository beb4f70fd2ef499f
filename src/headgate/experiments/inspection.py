"""What did the methods of a run learn? Tables as JSON, figures as PNG and SVG, beside the run."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headgate.data import wordmath
from headgate.data.readers.base import RawRow
from headgate.data.sources import load_rows
from headgate.errors import ConfigError
from headgate.experiments.recipe import Recipe
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.stream_figure import stream_figure
from headgate.experiments.token_heat import token_heat
from headgate.files import write_atomically
from headgate.methods.compose import methods_of
from headgate.methods.layer_routing.inspect import heat_map, measure, token_depth
from headgate.methods.layer_routing.method import LayerRouting
from headgate.methods.layer_routing.oracle import TokenLosses, choice, masked_losses, token_losses
from headgate.methods.lora_experts.inspect import likeness, timeline
from headgate.methods.schema_bank.inspect import describe_schemas, figure, trace_routing
from headgate.plugins import Registry
from headgate.training.saved import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from headgate.methods.lora_experts.method import LoraExperts
    from headgate.methods.schema_bank.method import SchemaBank

MOST_TOKENS = 512
DRAWN_TEXTS = 2
BATCH = 32
SHOWN_TEXTS = 3
PROMPT_END = "\nThe answer is: "


INSPECTORS: Registry[Callable[..., tuple[object, Mapping[str, Figure | str]]]] = Registry(
    "inspector",
    "headgate.inspectors",
    {
        "schema_bank": "headgate.experiments.inspection:_schemas",
        "layer_routing": "headgate.experiments.inspection:_depth",
        "lora_experts": "headgate.experiments.inspection:_experts",
    },
)
"""By the name of the method: (model, tokenizer, method, rows, are they wordmath's) -> (JSON tables, figures by name).

A figure is matplotlib's, or a page of HTML.
"""


def inspect_run(directory: RunDirectory, *, limit: int = 200) -> dict[str, Path]:
    """Look into every method of a finished run; returns the files written, by method.

    Raises ConfigError for a run without methods, or whose methods have nothing to look into.
    """
    recipe = directory.recipe()
    if not recipe.methods:
        raise ConfigError(f"{directory.path} trained no method: there is nothing to inspect")
    directory.result()
    model, tokenizer = load(directory.path)
    source, rows = recipe.data.validation or recipe.data.train, _validation_rows(recipe, limit)
    written = {}
    methods = methods_of(model)
    for name in [name for name in methods.names if name in INSPECTORS]:
        tables, drawn = INSPECTORS.get(name)(
            model, tokenizer, methods[name], rows, source.source == "wordmath" and source.path is None
        )
        folder = directory.path / "inspect"
        folder.mkdir(exist_ok=True)
        written[name] = folder / f"{name}.json"
        write_atomically(written[name], json.dumps(tables, indent=1))
        for figure_name, one in drawn.items():
            if isinstance(one, str):
                write_atomically(folder / f"{figure_name}.html", one)
                continue
            for suffix in ("png", "svg"):
                one.savefig(folder / f"{figure_name}.{suffix}", dpi=150)
    if not written:
        raise ConfigError(
            f"{', '.join(recipe.methods)}: nothing to inspect; its telemetry is in metrics.jsonl"
        )
    return written


def inspect_oracle(directories: Sequence[RunDirectory], *, limit: int = 200) -> Path:
    """What a choice per token among several runs' masks would gain; of one run, among all masks of its depth.

    Raises ConfigError for runs that tokenise differently, or one without a block to skip.
    """
    rows = _validation_rows(directories[0].recipe(), limit)
    names: list[str] = []
    losses: list[TokenLosses] = []
    depths: list[float] = []
    tokens: list[list[int]] | None = None
    for directory in directories:
        directory.result()
        model, tokenizer = load(directory.path)
        batches = _batches(model, tokenizer, [text_of(row) for row in rows])
        ids = [row for batch in batches for row in batch["input_ids"].tolist()]
        if tokens is not None and ids != tokens:
            raise ConfigError(
                f"{directory.path} reads other tokens than {directories[0].path}: give runs of one base model"
            )
        tokens = ids
        if len(directories) > 1:
            with methods_of(model).evaluation.figures(None) as figures:
                losses.append(token_losses(model, batches))
            names.append(str(directory.path))
            depths.append(figures.get("depth", 1.0))
            continue
        method = next((one for one in methods_of(model) if isinstance(one, LayerRouting)), None)
        if method is None or not method.config.num_skipped(method.num_blocks):
            raise ConfigError(
                f"{directory.path}: --oracle chooses among masks of a run's depth, and this run skips no block: give a "
                "run of layer_routing below full depth, or several runs"
            )
        masks, losses = masked_losses(method, model, batches)
        shut = [(mask[:: method.config.gates_per_block] == 0).nonzero()[:, 0] for mask in masks]
        names = ["skips " + ", ".join(str(method.blocks.start + int(p)) for p in places) for places in shut]
        depths = [float(method.shares.used_at(mask)) for mask in masks]
    gains = choice(torch.stack([one.loss for one in losses]), losses[0].document, losses[0].place)
    means = [float(one.loss.mean()) for one in losses]
    table = [{"name": n, "depth": d, "loss": loss} for n, d, loss in zip(names, depths, means, strict=True)]
    folder = directories[0].path / "inspect"
    folder.mkdir(exist_ok=True)
    write_atomically(
        folder / "oracle.json", json.dumps({"masks": table, **dataclasses.asdict(gains)}, indent=1)
    )
    return folder / "oracle.json"


def _validation_rows(recipe: Recipe, limit: int) -> list[RawRow]:
    source = recipe.data.validation or recipe.data.train
    return list(load_rows(source.model_copy(update={"limit": limit})))


def text_of(row: RawRow) -> str:
    """What a row says: its text, its turns one after the other, or prompt and completion."""
    if row.get("text") is not None:
        return str(row["text"])
    if row.get("messages") is not None:
        return "\n".join(str(turn["content"]) for turn in row["messages"])
    return f"{row['prompt']}{row.get('completion') or ''}"


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Right-padded batches; of a text longer than the model's context, what it can read."""
    device, batches = next(model.parameters()).device, []
    longest = min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", MOST_TOKENS))
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(
            list(texts[start : start + BATCH]),
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=longest,
        )
        batches.append({name: encoded[name].to(device) for name in ("input_ids", "attention_mask")})
    return batches


def _schemas(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    method: SchemaBank,
    rows: list[RawRow],
    generated: bool,
) -> tuple[dict[str, object], dict[str, Figure]]:
    """Every schema: load, top tokens and examples, agreement with tags, overlap between paraphrases."""
    texts = [text_of(row) for row in rows]
    pairs: list[tuple[int, int]] = []
    if generated:
        for index, row in enumerate(rows[: len(rows) // 2]):
            question = row["prompt"].removesuffix(PROMPT_END)
            other = wordmath.paraphrase({"example_id": row["example_id"], "question": question})
            pairs.append((index, len(texts)))
            texts.append(f"{other['question']}{PROMPT_END}{other['answer']}")
    batches = _batches(model, tokenizer, texts)
    traces = trace_routing(model, method, batches)
    tags = None
    if method.config.tags in ("hash", "keyword") and not method.config.permuted_tags:
        tags = [int(method.tags_of({"prompt": text})[0]) for text in texts]
    reports = describe_schemas(
        traces, lambda token: str(tokenizer.decode([token])), method.config.top_k, tags=tags, pairs=pairs
    )
    tables: dict[str, object] = {"examples": texts, "blocks": [report.as_dict() for report in reports]}
    return tables, {method.name: figure(reports)}


def token_category(text: str) -> str:
    """``number``, ``word``, ``space`` or ``symbol``: what a token is written with."""
    core = text.strip()
    if not core:
        return "space"
    return "number" if core.isdigit() else "word" if core.isalpha() else "symbol"


def token_text(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """How a token reads in a text; decoding a lone space may strip it, then its written form says what it is."""
    written = str(tokenizer.convert_ids_to_tokens(number)).replace("▁", " ").replace("Ġ", " ")
    return str(tokenizer.decode([number])) or written


def _depth(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    method: LayerRouting,
    rows: list[RawRow],
    _generated: bool,
) -> tuple[dict[str, object], dict[str, Figure | str]]:
    """Depth as at inference: by block, by token category, and token by token over a few texts."""
    from matplotlib.figure import Figure

    batches = _batches(model, tokenizer, [text_of(row) for row in rows])
    found = measure(method, batches)
    by_category: dict[str, list[float]] = defaultdict(list)
    shown = []
    for batch in batches:
        for ids, depths in zip(batch["input_ids"].tolist(), token_depth(method, batch).tolist(), strict=True):
            pairs = [
                (token_text(tokenizer, i), d) for i, d in zip(ids, depths, strict=True) if not math.isnan(d)
            ]
            shown.append({"tokens": [text for text, _ in pairs], "depth": [depth for _, depth in pairs]})
            for text, depth in pairs:
                by_category[token_category(text)].append(depth)
    categories = {
        name: {"depth": statistics.fmean(depths), "tokens": len(depths)}
        for name, depths in sorted(by_category.items())
    }
    drawn = Figure(figsize=(4.4, 2.6), layout="constrained")
    axes = drawn.subplots()
    axes.barh(list(categories), [entry["depth"] for entry in categories.values()], color="#0072B2")
    axes.axvline(found.utilization, color="#555555", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the blocks that ran (dashed: all tokens)")
    tables: dict[str, object] = {
        "tokens": found.tokens,
        "utilization": found.utilization,
        "open_rate": found.per_gate,
        "adaptivity_nats": found.adaptivity,
        "categories": categories,
        "texts": shown[:SHOWN_TEXTS],
    }
    heat = token_heat(shown[:DRAWN_TEXTS], "Depth token by token")
    page = heat_map(shown[0]["tokens"], shown[0]["depth"])
    return tables, {method.name: drawn, f"{method.name}_tokens": heat, f"{method.name}_text": page}


def _experts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, method: LoraExperts, rows: Sequence[object], _: bool
) -> tuple[dict[str, object], dict[str, Figure]]:
    from matplotlib.figure import Figure

    alike = likeness(method.experts)
    names = [str(row["expert"]) for row in alike["experts"]]
    size = 1.8 + 0.4 * len(names)
    drawn = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = drawn.subplots()
    image = axes.imshow(alike["cosines"], cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="expert", ylabel="expert", title="Cosine of the experts' updates")
    drawn.colorbar(image, ax=axes)
    stream = timeline(method.stream.decisions, alike["experts"])
    tables = {**alike, "stream": stream}
    if not stream["events"]:
        return tables, {method.name: drawn}
    return tables, {method.name: drawn, f"{method.name}_stream": stream_figure(stream)}
