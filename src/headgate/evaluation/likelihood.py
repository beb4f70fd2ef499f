"""Multiple choice by likelihood: the option that the model finds likeliest after the question.

``letters``: the options stand in the prompt and their letters are compared (Hendrycks et al. 2021, MMLU). ``texts``: the
options' texts are compared after the bare question (Clark et al. 2018, ARC as it is usually run);
``accuracy_norm`` divides by their bytes, as lm-evaluation-harness's ``acc_norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from headgate.data.readers.base import RawRow
from headgate.data.sources import load_rows
from headgate.data.templates import encode_rows
from headgate.errors import DataError
from headgate.evaluation.config import EvalTask
from headgate.evaluation.lm_eval_bridge import continuation_scores
from headgate.evaluation.predictions import Figures, Item, prompt_hash
from headgate.evaluation.prompts import SHOT_SEPARATOR, chosen_shots, shots
from headgate.models.anatomy import Batch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BARE = "Question: {question}\nAnswer:"


def option_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, Sequence[str]]],
    batch_size: int,
) -> list[list[float]]:
    """Log-likelihood (nats) of every continuation of every context. A context's trailing spaces are the continuation's."""
    pairs = [{"prompt": context, "completion": text} for context, texts in questions for text in texts]
    eos = tokenizer.eos_token_id
    rows = []
    for encoded in encode_rows(pairs, tokenizer, "completion"):
        ids = encoded.ids.tolist()
        if eos is not None:
            ids = ids[:-1]
        rows.append((ids, len(ids) - max(encoded.prompt_length, 1)))
    flat = iter(continuation_scores(model, rows, tokenizer.pad_token_id, batch_size))
    return [[next(flat)[0] for _ in texts] for _, texts in questions]


def likelihood_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    progress: Callable[[int, int], None] | None,
) -> tuple[Figures, list[Item]]:
    """Metrics (``accuracy_norm`` beside the verdicts) and one item a question. Raises DataError for rows without options."""
    rows = list(load_rows(task.source_config()))
    if any(not row.get("choices") or not row.get("answer") for row in rows):
        raise DataError(
            f"mode: likelihood needs rows with choices and an answer; source {task.source!r} has none"
        )
    letters = task.candidates == "letters" or (task.candidates == "auto" and task.source == "mmlu")
    pool = shots(task)
    questions = [_question(task, pool, row, letters) for row in rows]
    scores = []
    block = max(1, task.batch_size)
    for start in range(0, len(questions), block):
        scores += option_scores(model, tokenizer, questions[start : start + block], task.batch_size)
        if progress is not None:
            progress(min(start + block, len(questions)), len(questions))
    items = []
    for row, (context, options), values in zip(rows, questions, scores):
        right = LETTERS.index(row["answer"])
        best = max(range(len(values)), key=values.__getitem__)
        normed = [value / max(1, len(text.encode())) for value, text in zip(values, options)]
        items.append(
            {
                "id": row["example_id"],
                "prompt_hash": prompt_hash(context),
                "prompt": context,
                "gold": row["answer"],
                "output": LETTERS[best],
                "correct": best == right,
                "correct_norm": max(range(len(normed)), key=normed.__getitem__) == right,
                "log_likelihoods": values,
                "truncated": False,
                "prompt_truncated": False,
                "ended": True,
                "family": row.get("family"),
            }
        )
    norm = sum(item["correct_norm"] for item in items) / len(items)
    return {"accuracy_norm": norm, "candidates": "letters" if letters else "texts"}, items


def _question(task: EvalTask, pool: Sequence[Batch], row: RawRow, letters: bool) -> tuple[str, list[str]]:
    examples = chosen_shots(task, pool, row)
    if letters:
        prefix = "".join(f"{s['prompt']}{s['completion']}{SHOT_SEPARATOR}" for s in examples)
        return prefix + row["prompt"].rstrip(), [f" {LETTERS[i]}" for i in range(len(row["choices"]))]
    prefix = "".join(
        f"{BARE.format(question=s['meta_question'])} {s['choices'][LETTERS.index(s['answer'])]}{SHOT_SEPARATOR}"
        for s in examples
    )
    return prefix + BARE.format(question=row["meta_question"]), [f" {text}" for text in row["choices"]]
