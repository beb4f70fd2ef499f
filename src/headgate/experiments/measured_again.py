"""What a run reports, measured again from what was saved: validation losses, and evaluations item by item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.data.collation import Collator
from headgate.evaluation.config import EvalTask
from headgate.evaluation.predictions import read_predictions
from headgate.evaluation.tasks import run_task
from headgate.experiments.recipe import Recipe
from headgate.experiments.records import Check, RunRecord
from headgate.experiments.run_directory import RunDirectory
from headgate.methods.compose import methods_of
from headgate.models.anatomy import Batch, model_inputs
from headgate.training.validation import validation_metrics, validation_order, validation_sums

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SAMPLE = 8
"""Items of a generating task that are generated again."""
ROWS_AGAIN = 2_000
"""Perplexity tasks of up to so many rows are measured again whole by a run's own verification."""
UNCOMPARED = ("seconds",)


def check(name: str, ok: bool | None, detail: str) -> Check:
    """One line of a verification. ``ok``: None where it could not be asked."""
    return {"name": name, "ok": ok, "detail": detail}


def validation_again(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    result: RunRecord,
    validation: object,
    tolerance: float,
) -> Iterator[Check]:
    """Every validation loss that ``result.json`` reports for the end of the run."""
    parts = validation if isinstance(validation, Mapping) else {None: validation}
    for skill, rows in parts.items():
        prefix = "eval" if skill is None else f"eval_{skill}"
        reported = result["training"].get(f"{prefix}_loss")
        if reported is None or rows is None:
            continue
        loss = validation_loss(model, tokenizer, recipe, rows, skill)
        same = _agree(reported, loss, tolerance)
        detail = f"{reported!r} reported, {loss!r} measured from what was saved"
        yield check(f"{prefix}_loss", same, detail if not same else f"{loss!r} again")


def validation_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    rows: datasets.Dataset,
    skill: str | None,
) -> float:
    """As the trainer measures it during training: same rows, order, batches and sums."""
    collator = Collator(tokenizer.pad_token_id, ["example_id"])
    size, device = recipe.validation_batch_size, next(model.parameters()).device
    methods_of(model).evaluation.start_validation(skill)

    def forward(batch: Mapping[str, Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = model_inputs(batch)
        outputs = model(
            **inputs, num_items_in_batch=tokens, use_cache=False
        )  # as transformers' Trainer trains and validates
        return outputs.loss, outputs.logits

    def batches() -> Iterator[Batch]:
        order = validation_order(rows)
        for start in range(0, len(rows), size):
            batch = collator([rows[i] for i in order[start : start + size]])
            yield {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    sums, _ = validation_sums(forward, batches())
    methods_of(model).evaluation.start_validation(None)
    return validation_metrics(sums, "eval")["eval_loss"]


def task_again(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: RunDirectory,
    task: EvalTask,
    result: RunRecord,
    tolerance: float,
    full: bool,
) -> Check:
    """A sample of a task's items, or all of them where the batches decide the last bits (perplexity)."""
    stored = read_predictions(directory.predictions / f"{task.key}.jsonl")
    reads_losses = task.task == "perplexity"
    if reads_losses and len(stored) > ROWS_AGAIN and not full:
        return check(task.key, None, f"{len(stored)} rows: left to `headgate verify`")
    sample = (
        task if reads_losses or "sample_seed" in task.options else task.model_copy(update={"limit": SAMPLE})
    )
    again = run_task(model, tokenizer, sample).items
    wrong = [
        f"item {old.get('id')}: {difference}"
        for old, new in zip(stored, again, strict=False)
        if (difference := _item_difference(old, new, tolerance)) is not None
    ]
    if len(again) < min(len(stored), SAMPLE):
        wrong.append(f"{len(again)} items again, {len(stored)} stored")
    reported = result["evaluation"][task.key].get("loss")
    shown = "" if reported is None else f", loss {reported:.6f}"
    detail = (
        f"{len(wrong)} of {len(again)} items differ: {wrong[0]}"
        if wrong
        else f"{len(again)} items again{shown}"
    )
    return check(task.key, not wrong, detail)


def _item_difference(old: Mapping[str, object], new: Mapping[str, object], tolerance: float) -> str | None:
    """The first field in which two predictions differ."""
    for name in old:
        if name in UNCOMPARED or name not in new:
            continue
        if not _agree(old[name], new[name], tolerance):
            return f"{name} was {_short(old[name])}, is {_short(new[name])}"
    return None


def _agree(old: object, new: object, tolerance: float) -> bool:
    if isinstance(old, float) and isinstance(new, (int, float)):
        both_nan = math.isnan(old) and math.isnan(new)
        return both_nan or old == new or math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() == new.keys() and all(_agree(old[k], new[k], tolerance) for k in old)
    if isinstance(old, Sequence) and not isinstance(old, str) and isinstance(new, Sequence):
        return len(old) == len(new) and all(_agree(a, b, tolerance) for a, b in zip(old, new, strict=True))
    return bool(old == new)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
