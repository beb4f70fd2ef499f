"""``headgate eval RUN_OR_MODEL --task ...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headgate.cli.console import live_console, out, result_table
from headgate.cli.options import JsonOption
from headgate.cli.targets import open_target
from headgate.errors import ConfigError
from headgate.evaluation.config import EvalTask
from headgate.evaluation.predictions import write_predictions
from headgate.evaluation.tasks import run_task
from headgate.methods.base import build_config
from headgate.training.checkpoint import write_atomically

DEFAULT_SOURCES = {"gsm8k": "gsm8k", "mbpp": "mbpp", "humaneval": "humaneval"}


def evaluate(
    target: Annotated[
        str, typer.Argument(help="A run directory, a checkpoint, or a model name.", show_default=False)
    ],
    task: Annotated[
        list[str], typer.Option("--task", help="exact_match, gsm8k, perplexity, ... (repeatable).")
    ],
    source: Annotated[str | None, typer.Option(help="Data source of the task.")] = None,
    path: Annotated[str | None, typer.Option(help="Local file or folder with the data.")] = None,
    split: Annotated[str, typer.Option()] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first (or a seeded sample of) items.")] = None,
    sample_seed: Annotated[int | None, typer.Option(help="Draw `--limit` items with this seed.")] = None,
    style: Annotated[str, typer.Option(help="rationale or answer.")] = "rationale",
    max_new_tokens: Annotated[int, typer.Option()] = 256,
    batch_size: Annotated[int, typer.Option()] = 32,
    length: Annotated[list[int] | None, typer.Option(help="Perplexity context lengths.")] = None,
    few_shot: Annotated[int, typer.Option()] = 0,
    routing: Annotated[str | None, typer.Option(help="on, removed, all, dense: how methods act.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder for predictions; default: beside the run.")
    ] = None,
    json_file: JsonOption = None,
    allow_partial: Annotated[bool, typer.Option(help="Evaluate a run that has not finished.")] = False,
) -> None:
    """Measure a run, a saved checkpoint or a bare model; per-item predictions are written."""
    configs: list[EvalTask] = []
    for name in task:
        options: dict[str, Any] = {
            "task": name,
            "source": source or DEFAULT_SOURCES.get(name, "wordmath"),
            "path": path,
            "split": split,
            "limit": limit,
            "style": style,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "few_shot": few_shot,
            "options": {} if sample_seed is None else {"sample_seed": sample_seed},
        }
        if length:
            options["lengths"] = length
        configs.append(build_config(EvalTask, options))
    model, tokenizer, folder = open_target(target, device=device, allow_partial=allow_partial)
    if routing is not None:
        methods = list(getattr(model, "headgate_methods", []))
        if not methods:
            raise ConfigError(f"--routing {routing}: {target} has no routing method")
        for method in methods:
            method.set_routing(routing)
    results = {}
    where = output or (folder / "predictions" if folder is not None else Path("predictions"))
    with live_console() as console:
        for config in configs:
            result = run_task(
                model,
                tokenizer,
                config,
                lambda d, t, key=config.key: console.progress(f"evaluate {key}", d, t),
            )
            results[config.key] = result.metrics
            name = config.key if routing is None else f"{config.key}.{routing}"
            write_predictions(where / f"{name}.jsonl", result.items)
    out.print(result_table(target, results))
    out.print(f"predictions: {where}")
    if json_file is not None:
        write_atomically(json_file, json.dumps(results, indent=1))
