"""What did the methods of a run learn? Tables as JSON, figures as PNG and SVG, beside the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headgate.data import wordmath
from headgate.data.sources import load_rows
from headgate.errors import ConfigError
from headgate.experiments.run_directory import RunDirectory
from headgate.methods.schema_bank.inspect import describe_schemas, figure, trace_routing
from headgate.training.checkpoint import write_atomically
from headgate.training.saved import load

BATCH = 32
PROMPT_END = "\nThe answer is: "


def inspect_run(directory: RunDirectory, *, limit: int = 200) -> dict[str, Path]:
    """Look into every method of a finished run; returns the files written, by method.

    Raises ConfigError for a run without methods, or whose methods have nothing to look into.
    """
    recipe = directory.recipe()
    if not recipe.methods:
        raise ConfigError(f"{directory.path} trained no method: there is nothing to inspect")
    directory.result()
    model, tokenizer = load(directory.path)
    source = recipe.data.validation or recipe.data.train
    rows = list(load_rows(source.model_copy(update={"limit": limit})))
    written = {}
    for method in model.headgate_methods:
        if method.name not in INSPECTORS:
            continue
        tables, drawn = INSPECTORS[method.name](
            model, tokenizer, method, rows, source.source == "wordmath" and source.path is None
        )
        folder = directory.path / "inspect"
        folder.mkdir(exist_ok=True)
        written[method.name] = folder / f"{method.name}.json"
        write_atomically(written[method.name], json.dumps(tables, indent=1))
        for suffix in ("png", "svg"):
            drawn.savefig(folder / f"{method.name}.{suffix}", dpi=150)
    if not written:
        raise ConfigError(
            f"{', '.join(recipe.methods)}: nothing to inspect; its telemetry is in metrics.jsonl"
        )
    return written


def _schemas(
    model: Any, tokenizer: Any, method: Any, rows: list[Mapping[str, Any]], generated: bool
) -> tuple[Any, Any]:
    """Every schema: load, top tokens and examples, agreement with tags, overlap between paraphrases."""
    texts = [f"{row['prompt']}{row.get('completion') or ''}" for row in rows]
    pairs: list[tuple[int, int]] = []
    if generated:
        for index, row in enumerate(rows[: len(rows) // 2]):
            question = row["prompt"].removesuffix(PROMPT_END)
            other = wordmath.paraphrase({"example_id": row["example_id"], "question": question})
            pairs.append((index, len(texts)))
            texts.append(f"{other['question']}{PROMPT_END}{other['answer']}")
    batches = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(
            texts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="right"
        )
        device = next(model.parameters()).device
        batches.append({name: encoded[name].to(device) for name in ("input_ids", "attention_mask")})
    traces = trace_routing(model, method, batches)
    tags = None
    if method.config.tags in ("hash", "keyword") and not method.config.permuted_tags:
        tags = [int(method.tags_of({"prompt": text})[0]) for text in texts]
    reports = describe_schemas(
        traces, lambda token: tokenizer.decode([token]), method.config.top_k, tags=tags, pairs=pairs
    )
    return {"examples": texts, "blocks": [report.as_dict() for report in reports]}, figure(reports)


INSPECTORS: dict[str, Callable[..., tuple[Any, Any]]] = {"schema_bank": _schemas}
