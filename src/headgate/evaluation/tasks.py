"""Run one evaluation task on a live model: metrics, and one prediction per item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.stats import binomtest

from headgate.data.sources import load_rows
from headgate.errors import ConfigError
from headgate.evaluation.config import EvalTask
from headgate.evaluation.generation import generate
from headgate.evaluation.perplexity import perplexity
from headgate.evaluation.predictions import prompt_hash
from headgate.evaluation.scorers import flexible, score

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
        seed=task.seed,
        progress=progress,
    )
    primary = "strict" if task.style == "rationale" else "flexible"
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
                "ended": output.ended,
                "family": row.get("family"),
            }
        )
    metrics: dict[str, Any] = {
        **accuracy([item["correct"] for item in items]),
        "scorer": primary,
        "items": len(items),
        "truncated_rate": sum(item["truncated"] for item in items) / len(items),
        "eos_rate": sum(item["ended"] for item in items) / len(items),
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


def few_shot_prefix(task: EvalTask) -> str:
    """Worked examples from the training split, always the same ones for a seed."""
    if not task.few_shot:
        return ""
    shots = task.source_config().model_copy(update={"split": "train", "limit": task.few_shot})
    return "".join(f"{row['prompt']}{row['completion']}\n\n" for row in load_rows(shots))


def perplexity_task(model: Any, tokenizer: Any, task: EvalTask, progress: Progress | None) -> TaskResult:
    """Loss and perplexity at every asked length; the first length's loss is ``loss``."""
    rows = load_rows(task.source_config())
    metrics: dict[str, Any] = {}
    items: list[dict[str, Any]] = []
    for index, length in enumerate(task.lengths):
        found, per_row = perplexity(model, tokenizer, rows, length=length, batch_size=task.batch_size)
        metrics[str(length)] = found
        if index == 0:
            metrics.update({"loss": found["loss"], "perplexity": found["perplexity"], "items": found["rows"]})
            items = per_row
        if progress is not None:
            progress(index + 1, len(task.lengths))
    return TaskResult(metrics, items)


TASKS: dict[str, Callable[[Any, Any, EvalTask, Progress | None], TaskResult]] = {
    "exact_match": exact_match,
    "gsm8k": exact_match,
    "perplexity": perplexity_task,
}


def run_task(model: Any, tokenizer: Any, task: EvalTask, progress: Progress | None = None) -> TaskResult:
    """Dispatch on the task's name. Raises ConfigError for one that does not exist."""
    if task.task not in TASKS:
        raise ConfigError(f"evaluation: unknown task {task.task!r}: known are {', '.join(TASKS)}")
    return TASKS[task.task](model, tokenizer, task, progress)
