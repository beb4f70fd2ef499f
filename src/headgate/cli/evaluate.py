"""``headgate eval RUN_OR_MODEL --task ...``, and two of them ``--paired``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headgate.cli.console import live_console, out, result_table
from headgate.cli.options import JsonOption
from headgate.cli.targets import open_target
from headgate.config import build_config
from headgate.errors import ConfigError
from headgate.evaluation.config import CODE_TASKS, EvalTask
from headgate.evaluation.predictions import Figures, Item, write_predictions
from headgate.evaluation.sandbox import describe_isolation
from headgate.evaluation.tasks import TASKS, run_task
from headgate.experiments.paired import paired_lines, paired_report
from headgate.files import write_atomically

ROUTING_HELP = "How methods act: on, removed; shuffled (layer_routing: the control); arrow, expert:NUMBER (lora_experts); all, dense (schema_bank)."


def evaluate(
    target: Annotated[
        list[str],
        typer.Argument(
            help="A run directory, a checkpoint, or a model name; two with --paired.", show_default=False
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            help="exact_match, gsm8k, math500, arc_challenge, mmlu, perplexity, mbpp, humaneval, abilities, a task of "
            "lm-evaluation-harness (lm_eval:NAME where the name is Headgate's too), or a local task's "
            "YAML file or folder (repeatable, or separated by commas).",
        ),
    ],
    paired: Annotated[bool, typer.Option("--paired", help="Compare two targets on the same items.")] = False,
    source: Annotated[str | None, typer.Option(help="Data source of the task.")] = None,
    path: Annotated[str | None, typer.Option(help="Local file or folder with the data.")] = None,
    split: Annotated[str, typer.Option()] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first (or a seeded sample of) items.")] = None,
    sample_seed: Annotated[int | None, typer.Option(help="Draw `--limit` items with this seed.")] = None,
    style: Annotated[str, typer.Option(help="rationale or answer.")] = "rationale",
    prompt_template: Annotated[
        str | None, typer.Option(help="Another prompt, with {question} or {text} and {tests}.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: 256, math500: 1024.")] = None,
    batch_size: Annotated[int, typer.Option()] = 32,
    length: Annotated[list[int] | None, typer.Option(help="Perplexity context lengths.")] = None,
    windows: Annotated[
        str, typer.Option(help="Perplexity over: rows, disjoint or sliding windows.")
    ] = "rows",
    stride: Annotated[int | None, typer.Option(help="Of sliding windows; default: half the length.")] = None,
    few_shot: Annotated[int, typer.Option(help="Worked examples before each prompt.")] = 0,
    few_shot_by: Annotated[
        str | None, typer.Option(help="Examples of the question's own field: a column such as family.")
    ] = None,
    chat: Annotated[str, typer.Option(help="Prompts through the chat template: auto, on, off.")] = "auto",
    mode: Annotated[str | None, typer.Option(help="Of multiple choice: generation or likelihood.")] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="What `accuracy` means: strict, flexible, number, math, boxed, choice, text, math_verify, ..."
        ),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    samples_per_item: Annotated[int, typer.Option(help="Programs per problem, for pass@k.")] = 1,
    k: Annotated[list[int] | None, typer.Option("--k", help="pass@k for this k (repeatable).")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that the model wrote, in a sandbox.")
    ] = False,
    routing: Annotated[str | None, typer.Option(help=ROUTING_HELP)] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on a bare model.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder for predictions; default: beside the run.")
    ] = None,
    json_file: JsonOption = None,
    allow_partial: Annotated[bool, typer.Option(help="Evaluate a run that has not finished.")] = False,
) -> None:
    """Measure a run, a saved checkpoint or a bare model; per-item predictions are written."""
    if len(target) != (2 if paired else 1):
        raise ConfigError(
            f"{len(target)} targets given: "
            + ("--paired needs two" if paired else "give one, or two with --paired")
        )
    configs: list[EvalTask] = []
    for name in (part.strip() for listed in task for part in listed.split(",")):
        inner: dict[str, object] = {}
        options: dict[str, object] = {
            "task": name,
            "source": source,
            "path": path,
            "split": split,
            "limit": limit,
            "style": style,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "few_shot": few_shot,
            "few_shot_by": few_shot_by,
            "chat": chat,
            "mode": mode,
            "scorer": scorer,
            "do_sample": sample,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "samples_per_item": samples_per_item,
            "k": k or [1],
            "allow_code_execution": allow_code_execution,
            "windows": windows,
            "stride": stride,
            "routing": routing,
            "options": inner,
        }
        if sample_seed is not None:
            inner["sample_seed"] = sample_seed
        if prompt_template is not None:
            inner["prompt_template"] = prompt_template.replace("\\n", "\n")
        if length:
            options["lengths"] = length
        if name not in TASKS:
            options["label"] = Path(name).stem if "/" in name or name.endswith((".yaml", ".yml")) else name
        given = {key: value for key, value in options.items() if value is not None}
        configs.append(build_config(EvalTask, given))
    if any(config.task in CODE_TASKS for config in configs):
        out.print(f"sandbox: {describe_isolation()}")
    found = [
        measure(
            one,
            configs,
            device=device,
            allow_partial=allow_partial,
            adapter=adapter,
            output=output,
            several=paired,
        )
        for one in target
    ]
    results: Figures = found[0][0]
    if paired:
        results = {}
        for config in configs:
            report = paired_report(found[0][1][config.key], found[1][1][config.key])
            results[config.key] = report
            out.print(f"\n{config.key}: A = {target[0]}, B = {target[1]}", markup=False)
            for line in paired_lines(report, ("A", "B")):
                out.print(line, markup=False)
    if json_file is not None:
        write_atomically(json_file, json.dumps(results, indent=1))


def measure(
    target: str,
    configs: list[EvalTask],
    *,
    device: str,
    allow_partial: bool,
    adapter: str | None,
    output: Path | None,
    several: bool,
) -> tuple[Figures, dict[str, list[Item]]]:
    """Metrics and items of every task on one target; the table is printed and the predictions are written."""
    model, tokenizer, folder = open_target(
        target, device=device, allow_partial=allow_partial, adapter=adapter
    )
    where = output or (folder / "predictions" if folder is not None else Path("predictions"))
    if several and (output is not None or folder is None):
        where = where / (folder.name if folder is not None else Path(target).name.replace(":", "-"))
    metrics, items = {}, {}
    with live_console() as console:
        for config in configs:
            result = run_task(
                model,
                tokenizer,
                config,
                partial(console.progress, f"evaluate {config.key}"),
            )
            metrics[config.key], items[config.key] = result.metrics, result.items
            name = config.key if config.routing is None else f"{config.key}.{config.routing}"
            write_predictions(where / f"{name}.jsonl", result.items)
    out.print(result_table(target, metrics))
    for key, found in metrics.items():
        for line in details(found):
            out.print(f"{key}: {line}", markup=False)
    out.print(f"predictions: {where}", markup=False)
    return metrics, items


def details(metrics: Figures) -> list[str]:
    """What does not fit in the table: every scorer, how programs ended, several lengths."""
    lines = []
    if "scorers" in metrics:
        lines.append("  ".join(f"{name} {value:.1%}" for name, value in metrics["scorers"].items()))
    if metrics.get("prompts_truncated"):
        lines.append(
            f"{metrics['prompts_truncated']} prompts lost their beginning: they fill the model's context"
        )
    if "outcomes" in metrics:
        passes = "  ".join(
            f"{name} {value:.1%}" for name, value in metrics.items() if name.startswith("pass@")
        )
        lines.append(
            f"{passes}  programs: " + ", ".join(f"{n} {kind}" for kind, n in metrics["outcomes"].items())
        )
    lengths = [name for name in metrics if name.isdigit()]
    if len(lengths) > 1:
        lines.append("  ".join(f"{name} tokens: {metrics[name]['perplexity']:.3f}" for name in lengths))
    if "delta" in metrics:
        change = metrics["delta"]
        lost = ", ".join(metrics["forgotten"]) or "nothing"
        lines.append(
            f"against before training: accuracy {change['accuracy']:+.1%}, loss {change['loss']:+.4f}; worse: {lost}"
        )
    if "harness" in metrics:
        lines += [f"{name} {value:.4f}" for name, value in metrics["harness"].items()]
    return lines
