"""Run one evaluation task on a live model: metrics, and one prediction per item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from headgate.data.sources import load_rows
from headgate.errors import ConfigError, DataError
from headgate.evaluation.code_tasks import code_task
from headgate.evaluation.config import EvalTask
from headgate.evaluation.generation import generate
from headgate.evaluation.lm_eval_bridge import harness_task
from headgate.evaluation.perplexity import perplexity, text_perplexity
from headgate.evaluation.predictions import prompt_hash
from headgate.evaluation.scorers import flexible, score
from headgate.methods.figures import evaluation_figures

Progress = Callable[[int, int], None]


@dataclass
class TaskResult:
    """Metrics of a task, and its items (id, prompt hash, output, parsed answer, score, truncated)."""

    metrics: dict[str, Any]
    items: list[dict[str, Any]] = field(default_factory=list)


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Share correct with its 95% Wilson interval."""
    test = binomtest(sum(correct), len(correct)).proportion_ci(0.95, method="wilson")
    return {"accuracy": sum(correct) / len(correct), "low": float(test.low), "high": float(test.high)}


def exact_match(model: Any, tokenizer: Any, task: EvalTask, progress: Progress | None) -> TaskResult:
    """Greedy (or sampled) answers to worked problems under every scorer; ``accuracy`` is the strict one's."""
    rows = load_rows(task.source_config())
    if "prompt" not in rows.column_names or "answer" not in rows.column_names:
        raise DataError(
            f"task {task.task} needs rows with a prompt and an answer; source {task.source!r} has {rows.column_names}"
        )
    prefix = few_shot_prefix(task)
    prompts = [prefix + row["prompt"] for row in rows]
    outputs = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
        do_sample=task.do_sample,
        temperature=task.temperature,
        top_p=task.top_p,
        seed=task.seed,
        stop=[SHOT_SEPARATOR] if task.few_shot else [],
        progress=progress,
    )
    primary = task.scorer or ("strict" if task.style == "rationale" else "flexible")
    items = []
    for row, prompt, output in zip(rows, prompts, outputs, strict=True):
        verdicts = score(output.text, row["answer"])
        items.append(
            {
                "id": row["example_id"],
                "prompt_hash": prompt_hash(prompt),
                "prompt": row["prompt"],
                "gold": row["answer"],
                "output": output.text,
                "parsed": flexible(output.text),
                "correct": verdicts[primary],
                "scores": verdicts,
                "truncated": output.truncated,
                "prompt_truncated": output.prompt_truncated,
                "ended": output.ended,
                "family": row.get("family"),
            }
        )
    metrics: dict[str, Any] = {
        **accuracy([item["correct"] for item in items]),
        "scorer": primary,
        **rates(items),
        "scorers": {
            name: sum(item["scores"][name] for item in items) / len(items) for name in items[0]["scores"]
        },
    }
    families = sorted({item["family"] for item in items if item["family"]})
    if families:
        metrics["by_family"] = {
            family: accuracy([i["correct"] for i in items if i["family"] == family])["accuracy"]
            for family in families
        }
    return TaskResult(metrics, items)


def rates(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many items, and how their outputs ended."""
    return {
        "items": len(items),
        "truncated_rate": sum(item["truncated"] for item in items) / len(items),
        "eos_rate": sum(item["ended"] for item in items) / len(items),
        "prompts_truncated": sum(item["prompt_truncated"] for item in items),
    }


SHOT_SEPARATOR = "\n\n"


def few_shot_prefix(task: EvalTask) -> str:
    """Worked examples from the training split, always the same ones for a seed."""
    if not task.few_shot:
        return ""
    source = task.source_config()
    options = {name: value for name, value in source.options.items() if name != "sample_seed"}
    if source.path is not None and Path(source.path).is_file() and source.source != "mbpp":
        sibling = Path(source.path).with_name(Path(source.path).name.replace(source.split, "train", 1))
        if not sibling.exists() or sibling == Path(source.path):
            raise ConfigError(
                f"few_shot={task.few_shot} takes its examples from the training split, and there is none beside "
                f"{source.path}: give the folder that holds train and {source.split}"
            )
        source = source.model_copy(update={"path": str(sibling)})
    shots = source.model_copy(update={"split": "train", "limit": task.few_shot, "options": options})
    return "".join(f"{row['prompt']}{row['completion']}{SHOT_SEPARATOR}" for row in load_rows(shots))


def perplexity_task(model: Any, tokenizer: Any, task: EvalTask, progress: Progress | None) -> TaskResult:
    """Loss and perplexity at every asked length; the first length's loss is ``loss``."""
    rows = load_rows(task.source_config())
    metrics: dict[str, Any] = {}
    items: list[dict[str, Any]] = []
    for index, length in enumerate(task.lengths):
        if task.windows == "rows":
            found, per_row = perplexity(model, tokenizer, rows, length=length, batch_size=task.batch_size)
        else:
            stride = length if task.windows == "disjoint" else task.stride or max(1, length // 2)
            found, per_row = text_perplexity(
                model, tokenizer, rows, length=length, stride=stride, batch_size=task.batch_size
            )
        metrics[str(length)] = found
        if index == 0:
            metrics.update({"loss": found["loss"], "perplexity": found["perplexity"], "items": found["rows"]})
            items = per_row
        if progress is not None:
            progress(index + 1, len(task.lengths))
    return TaskResult(metrics, items)


def code(model: Any, tokenizer: Any, task: EvalTask, progress: Progress | None) -> TaskResult:
    """Programs, run in the sandbox; ``accuracy`` is pass@1 of the first sample."""
    metrics, items = code_task(model, tokenizer, task, progress, few_shot_prefix(task))
    return TaskResult({**accuracy([item["correct"] for item in items]), **rates(items), **metrics}, items)


TASKS: dict[str, Callable[[Any, Any, EvalTask, Progress | None], TaskResult]] = {
    "exact_match": exact_match,
    "gsm8k": exact_match,
    "perplexity": perplexity_task,
    "mbpp": code,
    "humaneval": code,
}


def run_task(model: Any, tokenizer: Any, task: EvalTask, progress: Progress | None = None) -> TaskResult:
    """Dispatch on the task's name; what is not ours is asked of lm-evaluation-harness.

    ``task.routing`` holds for this task alone; what methods measure of it (depth) stands among the metrics. Raises ConfigError for a task that does not exist.
    """
    with routing(model, task.routing), evaluation_figures(model, tokenizer.pad_token_id) as figures:
        result = _run(model, tokenizer, task, progress)
    return TaskResult({**result.metrics, **figures}, result.items)


def _run(model: Any, tokenizer: Any, task: EvalTask, progress: Progress | None) -> TaskResult:
    if task.task in TASKS:
        return TASKS[task.task](model, tokenizer, task, progress)
    metrics, items = harness_task(model, tokenizer, task, known=TASKS, progress=progress)
    if all(isinstance(item["correct"], bool) for item in items):
        metrics = {**accuracy([item["correct"] for item in items]), **metrics}
    return TaskResult(metrics, items)


@contextmanager
def routing(model: Any, how: str | None) -> Iterator[None]:
    """The methods on ``model`` act as ``how`` says, and as before afterwards; None changes nothing."""
    if how is None:
        yield
        return
    methods = list(getattr(model, "headgate_methods", []))
    if not methods:
        raise ConfigError(f"routing={how}: this model has no routing method")
    before = [(method, getattr(method, "routing", "on")) for method in methods]
    try:
        for method in methods:
            method.set_routing(how)
        yield
    finally:
        for method, was in before:
            method.set_routing(was)
