"""What a model could do before it was fine-tuned, and can do after: a small fixed suite, and the differences.

Forty-eight questions with four options in six fields, by likelihood per byte; six short texts in six registers and two
dozen word problems of the embedded model's own families, by loss per token. It ships with the package and needs no network. It is made to show forgetting, not to rank models: the
95% interval of 48 questions is about 13 points wide on either side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headgate.data import wordmath
from headgate.data.cache import code_version, digest, entry
from headgate.data.templates import encode_rows
from headgate.data.token_store import tokenizer_digest
from headgate.evaluation.config import ABILITIES, EvalTask
from headgate.evaluation.likelihood import BARE, option_scores
from headgate.evaluation.perplexity import sequence_losses
from headgate.evaluation.predictions import Figures, Item, prompt_hash
from headgate.models.anatomy import unwrap
from headgate.models.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBLEMS = 24
BEFORE = "headgate_abilities"
"""Where a base model keeps what it could do before training."""


@cache
def suite() -> Figures:
    content: dict[str, Any] = json.loads(Path(__file__).with_name("abilities.json").read_text())
    return content


def measured_abilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Figures, list[Item]]:
    """Share right in all and by field, loss in all and by register; and one item a question."""
    questions = suite()["questions"]
    asked = [
        (BARE.format(question=q["question"]), [f" {option}" for option in q["options"]]) for q in questions
    ]
    scores: list[list[float]] = []
    for start in range(0, len(asked), 8):
        scores += option_scores(model, tokenizer, asked[start : start + 8], batch_size)
        if progress is not None:
            progress(min(start + 8, len(asked)), len(asked))
    items = []
    for question, (context, options), values in zip(questions, asked, scores):
        normed = [value / len(text.encode()) for value, text in zip(values, options)]
        best = max(range(len(normed)), key=normed.__getitem__)
        items.append(
            {
                "id": f"{question['field']}:{prompt_hash(context)}",
                "prompt_hash": prompt_hash(context),
                "prompt": context,
                "gold": question["options"][question["answer"]],
                "output": question["options"][best],
                "correct": best == question["answer"],
                "family": question["field"],
                "truncated": False,
                "prompt_truncated": False,
                "ended": True,
            }
        )
    fields = sorted({item["family"] for item in items})
    registers, texts = texts_by_register()
    encoded = encode_rows(texts, tokenizer, "completion")
    rows = [{"input_ids": row.ids.tolist(), "labels": row.labels().tolist()} for row in encoded]
    losses = sequence_losses(model, rows, tokenizer.pad_token_id, batch_size)
    totals: dict[str, list[float]] = {}
    for register, (value, count) in zip(registers, losses):
        total = totals.setdefault(register, [0.0, 0.0])
        total[0], total[1] = total[0] + value, total[1] + count
    metrics = {
        "accuracy": share(items),
        "by_family": {field: share([i for i in items if i["family"] == field]) for field in fields},
        "loss": math.fsum(value for value, _ in losses) / sum(count for _, count in losses),
        "loss_by_register": {register: value / count for register, (value, count) in totals.items()},
    }
    return metrics, items


def texts_by_register() -> tuple[list[str], list[dict[str, str]]]:
    """Registers and rows: the six texts, and word problems of the families that the embedded model was made on."""
    registers, rows = [], []
    for text in suite()["texts"]:
        registers.append(text["field"])
        rows.append({"text": text["text"]})
    for row in wordmath.generate("test", PROBLEMS, families=wordmath.PRETRAINING_FAMILIES):
        registers.append("word problems")
        rows.append({"prompt": f"{row['question']}\nThe answer is: ", "completion": row["answer"]})
    return registers, rows


def share(items: Sequence[Item]) -> float:
    return sum(item["correct"] for item in items) / len(items)


def remember_abilities(
    tasks: Sequence[EvalTask], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Measure the suite on a model that is not trained yet, where a recipe asks for it; kept for every arm and seed."""
    task = next((task for task in tasks if task.task == ABILITIES), None)
    if task is None:
        return
    if is_sharded(model):  # who waits for the cache's lock would be missing from the forwards of who holds it
        object.__setattr__(unwrap(model), BEFORE, measured_abilities(model, tokenizer, task.batch_size)[0])
        return
    key = digest(weights_digest(model), tokenizer_digest(tokenizer), suite()["version"], code_version())
    _, before = entry(
        "abilities", key, lambda _folder: measured_abilities(model, tokenizer, task.batch_size)[0]
    )
    object.__setattr__(unwrap(model), BEFORE, before)


def abilities_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    progress: Callable[[int, int], None] | None,
) -> tuple[Figures, list[Item]]:
    """The suite now; with ``before``, ``delta`` and the fields and registers that got worse, where it was measured."""
    metrics, items = measured_abilities(model, tokenizer, task.batch_size, progress)
    before = getattr(unwrap(model), BEFORE, None)
    if before is None:
        return metrics, items
    delta = {name: metrics[name] - before[name] for name in ("accuracy", "loss")}
    for name in ("by_family", "loss_by_register"):
        delta[name] = {part: value - before[name][part] for part, value in metrics[name].items()}
    forgotten = [field for field, change in delta["by_family"].items() if change < 0]
    forgotten += [register for register, change in delta["loss_by_register"].items() if change > 0.01]
    return {**metrics, "before": before, "delta": delta, "forgotten": forgotten}, items


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Names, shapes and sums of a model's parameters: enough to know a base by, in one pass over memory."""
    content = hashlib.sha256()
    for name, parameter in unwrap(model).named_parameters():
        total = (
            float(parameter.double().sum()) if parameter.numel() < 1 << 24 else float(parameter.float().sum())
        )
        content.update(f"{name}{tuple(parameter.shape)}{total!r}".encode())
    return content.hexdigest()
