"""Run one evaluation task on a live model: metrics, and one prediction per item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from headgate.data.sources import load_rows
from headgate.evaluation.abilities import abilities_task
from headgate.evaluation.code_tasks import code_task, pass_at_k
from headgate.evaluation.config import EvalTask
from headgate.evaluation.extraction import choice, mathematics, texts
from headgate.evaluation.generation import generate
from headgate.evaluation.golds import gold_answers
from headgate.evaluation.likelihood import likelihood_task
from headgate.evaluation.lm_eval_bridge import harness_task
from headgate.evaluation.perplexity import perplexity, text_perplexity
from headgate.evaluation.predictions import Figures, Item, prompt_hash
from headgate.evaluation.prompts import SHOT_SEPARATOR, few_shot_prefix, prompts_of
from headgate.evaluation.scorers import PARSERS, check_golds, score, suited
from headgate.methods.compose import methods_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Progress = Callable[[int, int], None]


@dataclass
class TaskResult:
    """Metrics of a task, and its items (id, prompt hash, output, parsed answer, score, truncated)."""

    metrics: Figures
    items: list[Item] = field(default_factory=list)


def accuracy(correct: Sequence[bool]) -> Figures:
    """Share correct with its 95% Wilson interval."""
    test = binomtest(sum(correct), len(correct)).proportion_ci(0.95, method="wilson")
    return {"accuracy": sum(correct) / len(correct), "low": float(test.low), "high": float(test.high)}


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: EvalTask, progress: Progress | None
) -> TaskResult:
    """Greedy (or sampled) answers under every scorer; ``accuracy`` is that of the first sample, under one of them.

    Raises DataError for rows without a gold answer, and for a gold that the scorer could never match.
    """
    if task.mode == "likelihood":
        return likelihood(model, tokenizer, task, progress)
    rows = list(load_rows(task.source_config()))
    golds, options = gold_answers(rows, task), [row.get("choices") or () for row in rows]
    primary = task.scorer or suited(
        [several[0] for several in golds],
        [str(row.get("completion") or "") for row in rows],
        choices=all(options),
        rationale=task.style == "rationale",
    )
    check_golds(primary, golds, options, [row["example_id"] for row in rows])
    asked, prompts, chat = prompts_of(task, rows, model, tokenizer)
    n = task.samples_per_item
    outputs = generate(
        model,
        tokenizer,
        [prompt for prompt in asked for _ in range(n)],
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
        do_sample=task.do_sample,
        temperature=task.temperature,
        top_p=task.top_p,
        seed=task.seed,
        stop=[SHOT_SEPARATOR] if task.few_shot and not chat else [],
        progress=progress,
    )
    items = []
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        samples = outputs[index * n : (index + 1) * n]
        verdicts = [score(output.text, golds[index], options[index]) for output in samples]
        first = samples[0]
        item = {
            "id": row["example_id"],
            "prompt_hash": prompt_hash(prompt),
            "prompt": row.get("prompt") or prompt,
            "gold": golds[index][0],
            "output": first.text,
            "parsed": parsed(primary, first.text, options[index]),
            "correct": verdicts[0][primary],
            "scores": verdicts[0],
            "truncated": any(output.truncated for output in samples),
            "prompt_truncated": first.prompt_truncated,
            "ended": all(output.ended for output in samples),
            "family": row.get("family"),
        }
        if n > 1:
            passed = sum(verdict[primary] for verdict in verdicts)
            item |= {"outputs": [output.text for output in samples], "passed": passed, "samples": n}
        if len(golds[index]) > 1:
            item["golds"] = golds[index]
        items.append(item)
    metrics: Figures = {
        **accuracy([item["correct"] for item in items]),
        "scorer": primary,
        "chat": chat,
        **rates(items),
        "scorers": {
            name: sum(item["scores"][name] for item in items) / len(items) for name in items[0]["scores"]
        },
    }
    if n > 1:
        for k in sorted({1, *task.k}):
            metrics[f"pass@{k}"] = sum(pass_at_k(n, item["passed"], k) for item in items) / len(items)
    return TaskResult(metrics | by_family(items), items)


def parsed(scorer: str, output: str, options: Sequence[str]) -> str | None:
    """What the scorer took for the answer, for the records."""
    if scorer == "choice":
        return choice(output, options)
    if scorer in PARSERS:
        return PARSERS[scorer](output)
    candidates = texts(output) if scorer == "text" else mathematics(output)
    return candidates[-1] if candidates else None


def by_family(items: Sequence[Item]) -> Figures:
    families = sorted({item["family"] for item in items if item["family"]})
    if not families:
        return {}
    shares = {
        family: accuracy([i["correct"] for i in items if i["family"] == family])["accuracy"]
        for family in families
    }
    return {"by_family": shares}


def likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: EvalTask, progress: Progress | None
) -> TaskResult:
    """Multiple choice by likelihood."""
    metrics, items = likelihood_task(model, tokenizer, task, progress)
    return TaskResult(
        {**accuracy([item["correct"] for item in items]), **rates(items), **metrics, **by_family(items)},
        items,
    )


def rates(items: Sequence[Item]) -> Figures:
    """How many items, and how their outputs ended."""
    return {
        "items": len(items),
        "truncated_rate": sum(item["truncated"] for item in items) / len(items),
        "eos_rate": sum(item["ended"] for item in items) / len(items),
        "prompts_truncated": sum(item["prompt_truncated"] for item in items),
    }


def perplexity_task(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: EvalTask, progress: Progress | None
) -> TaskResult:
    """Loss and perplexity at every asked length; the first length's loss is ``loss``."""
    rows = load_rows(task.source_config())
    metrics: Figures = {}
    items: list[Item] = []
    for index, length in enumerate(task.lengths):
        if task.windows == "rows":
            measured, per_row = perplexity(model, tokenizer, rows, length=length, batch_size=task.batch_size)
        else:
            stride = length if task.windows == "disjoint" else task.stride or max(1, length // 2)
            measured, per_row = text_perplexity(
                model, tokenizer, rows, length=length, stride=stride, batch_size=task.batch_size
            )
        metrics[str(length)] = measured
        if index == 0:
            metrics.update(
                {"loss": measured["loss"], "perplexity": measured["perplexity"], "items": measured["rows"]}
            )
            items = per_row
        if progress is not None:
            progress(index + 1, len(task.lengths))
    return TaskResult(metrics, items)


def code(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: EvalTask, progress: Progress | None
) -> TaskResult:
    """Programs, run in the sandbox; ``accuracy`` is pass@1 of the first sample."""
    metrics, items = code_task(model, tokenizer, task, progress, few_shot_prefix(task))
    return TaskResult({**accuracy([item["correct"] for item in items]), **rates(items), **metrics}, items)


def abilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: EvalTask, progress: Progress | None
) -> TaskResult:
    """General abilities beside what was trained: what the model could do before, and can do now."""
    metrics, items = abilities_task(model, tokenizer, task, progress)
    return TaskResult({**metrics, **accuracy([item["correct"] for item in items]), **rates(items)}, items)


TASKS: dict[
    str, Callable[[PreTrainedModel, PreTrainedTokenizerFast, EvalTask, Progress | None], TaskResult]
] = {
    "exact_match": exact_match,
    "gsm8k": exact_match,
    "math500": exact_match,
    "arc_challenge": exact_match,
    "arc_easy": exact_match,
    "mmlu": exact_match,
    "abilities": abilities,
    "perplexity": perplexity_task,
    "mbpp": code,
    "humaneval": code,
}


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: EvalTask,
    progress: Progress | None = None,
) -> TaskResult:
    """Dispatch on the task's name; what is not ours is asked of lm-evaluation-harness.

    ``task.routing`` holds for this task alone; what methods measure of it (depth) stands among the metrics. Raises ConfigError for a task that does not exist.
    """
    measured = methods_of(model).evaluation.figures(tokenizer.pad_token_id)
    with routing(model, task.routing), measured as figures:
        result = _run(model, tokenizer, task, progress)
    return TaskResult({**result.metrics, **figures}, result.items)


def _run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: EvalTask, progress: Progress | None
) -> TaskResult:
    if task.task in TASKS:
        return TASKS[task.task](model, tokenizer, task, progress)
    name = task.task.removeprefix("lm_eval:")
    metrics, items = harness_task(
        model,
        tokenizer,
        task.model_copy(update={"task": name}),
        known=TASKS if name == task.task else (),
        progress=progress,
    )
    if all(isinstance(item["correct"], bool) for item in items):
        metrics = {**accuracy([item["correct"] for item in items]), **metrics}
    return TaskResult(metrics, items)


def routing(model: Any, how: str | None) -> AbstractContextManager[None]:
    """The methods on ``model`` act as ``how`` says, and as before afterwards; an exported model routes itself."""
    if getattr(model.config, "model_type", None) == "headgate":
        exported: AbstractContextManager[None] = model.routed(how)
        return exported
    return methods_of(model).evaluation.routing(how)
