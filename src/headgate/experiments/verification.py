"""Is a run what it saved? What is on disk is loaded again, as anybody would, and measured again.

    reported validation loss  ==  validation loss of what was saved, to the last bit
    reported predictions      ==  predictions of what was saved, item by item

Every run does this at its end, on all of its validation rows and a sample of every evaluation; ``headgate verify`` does
more of it, later, in another process. On the machine that made the run every figure must agree bitwise; elsewhere
(other versions, processor, number of threads) within ``ELSEWHERE``, and it is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from headgate.data.collation import Collator
from headgate.errors import DamagedFile, HeadgateError
from headgate.evaluation.config import EvalTask
from headgate.evaluation.predictions import read_predictions
from headgate.evaluation.tasks import run_task
from headgate.experiments.environment import environment
from headgate.experiments.inputs import changed_inputs, input_digests
from headgate.experiments.recipe import Recipe
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.untrained import attached_untrained
from headgate.files import digest, read_json
from headgate.methods.compose import methods_of
from headgate.models.anatomy import model_inputs
from headgate.models.config import ParallelConfig
from headgate.models.load import load_base, prepare_model
from headgate.training import checkpoint
from headgate.training.saved import load
from headgate.training.validation import validation_metrics, validation_order, validation_sums

SAMPLE = 8
"""Items of a generating task that are generated again."""
ROWS_AGAIN = 2_000
"""Perplexity tasks of up to so many rows are measured again whole by a run's own verification."""
ELSEWHERE = 1e-3
"""Relative difference allowed between machines, where sums are taken in another order."""
UNCOMPARED = ("seconds",)

Check = dict[str, Any]


def verification(
    directory: RunDirectory,
    result: Mapping[str, Any],
    validation: Any,
    *,
    full: bool = False,
    parallel: ParallelConfig | None = None,
) -> dict[str, Any]:
    """The record of a run: ``{"verified": ..., "form": "short" | "full", "checks": [{name, ok, detail}]}``.

    Args:
        result: what is, or is to be, in ``result.json``.
        validation: the prepared validation rows, or a mapping from skills to them; None where there are none.
        full: every perplexity row is measured again, however many there are.
        parallel: over which ranks the base is spread while they verify together; None holds it whole.
    """
    recipe = directory.recipe()
    checks = [*_continuity(directory, recipe, result), *_predictions_add_up(directory, result)]
    elsewhere = machine_difference(directory)
    try:
        model, tokenizer = _reload(directory, recipe, parallel)
    except (HeadgateError, OSError, RuntimeError, ValueError) as error:
        checks.append(_check("reload", False, f"what was saved cannot be loaded: {error}"))
    else:
        tolerance = 0.0 if elsewhere is None else ELSEWHERE
        checks += _validation_again(model, tokenizer, recipe, result, validation, tolerance)
        for task in recipe.evaluation:
            checks.append(_task_again(model, tokenizer, directory, task, result, tolerance, full))
    record = {
        "verified": all(check["ok"] is not False for check in checks),
        "form": "full" if full else "short",
    }
    return record | {"machine": elsewhere or "the one that made the run", "checks": checks}


def verify_run(directory: RunDirectory) -> dict[str, Any]:
    """The full record of a complete run, its files and inputs included."""
    from headgate.experiments.prepared import prepare_run

    result = directory.result()
    recipe = directory.recipe()
    checks = [_files(directory), _saved_folder(directory), _inputs(directory, recipe)]
    prepared = prepare_run(recipe)
    prepared.release_model()
    record = verification(directory, result, prepared.validation, full=True)
    record["checks"] = [*checks, *record["checks"]]
    record["verified"] = all(check["ok"] is not False for check in record["checks"])
    return record


def failures(record: Mapping[str, Any]) -> list[str]:
    """What differs, a line each."""
    return [f"{check['name']}: {check['detail']}" for check in record["checks"] if check["ok"] is False]


def machine_difference(directory: RunDirectory) -> str | None:
    """What of this machine can change the last bits of a sum, against the run's; None where nothing does."""
    made, here = directory.environment(), environment()
    differing = [
        f"{key} {then.get(key)} then, {now.get(key)} now"
        for section, keys in (
            ("versions", ("torch", "transformers")),
            ("hardware", ("processor", "threads", "gpus")),
        )
        for then, now in [(made.get(section, {}), here[section])]
        for key in keys
        if then.get(key) != now.get(key)
    ]
    return "; ".join(differing) or None


def _check(name: str, ok: bool | None, detail: str) -> Check:
    return {"name": name, "ok": ok, "detail": detail}


def _files(directory: RunDirectory) -> Check:
    """Every file of the run's manifest is there and is what was written."""
    if not directory.manifest_file.exists():
        return _check("files", None, "this run has no manifest (made by an earlier version)")
    try:
        files = read_json(directory.manifest_file)["files"]
    except (DamagedFile, KeyError) as error:
        return _check("files", False, str(error))
    wrong = [
        f"{name} {'has changed' if (directory.path / name).exists() else 'is missing'}"
        for name, written in files.items()
        if not (directory.path / name).exists() or digest(directory.path / name) != written
    ]
    return _check("files", not wrong, ", ".join(wrong) or f"{len(files)} files as they were written")


def _saved_folder(directory: RunDirectory) -> Check:
    if not directory.checkpoint.exists():
        trained = directory.result()["training"]["steps"] > 0
        return _check(
            "checkpoint", not trained, "missing" if trained else "nothing was trained, so nothing was saved"
        )
    wrong = checkpoint.damage(directory.checkpoint)
    return _check("checkpoint", wrong is None, wrong or "whole, unharmed and finite")


def _inputs(directory: RunDirectory, recipe: Recipe) -> Check:
    if not directory.inputs_file.exists():
        return _check(
            "inputs", None, "this run recorded no digests of its inputs (made by an earlier version)"
        )
    before = read_json(directory.inputs_file)
    changed = changed_inputs(before, input_digests(recipe))
    return _check(
        "inputs", not changed, f"changed: {', '.join(changed)}" if changed else f"{len(before)} as they were"
    )


def _continuity(directory: RunDirectory, recipe: Recipe, result: Mapping[str, Any]) -> Iterator[Check]:
    """``metrics.jsonl`` tells one undisturbed run: no torn line, no step twice, none missing, totals that only grow."""
    steps = result["training"]["steps"]
    if steps == 0:
        return
    with directory.metrics_file.open("rb") as file:
        lines = sum(1 for _ in file)
    rows = directory.metrics()
    wrong = [] if len(rows) == lines else [f"{lines - len(rows)} of {lines} lines are no rows"]
    trained = [row for row in rows if "stage_step" in row]
    logged = [row["step"] for row in trained]
    due = [s for s in range(1, steps + 1) if s == 1 or s % recipe.logging_every == 0]
    if logged != due:
        extra = sorted({step for step in logged if logged.count(step) > 1 or step not in due})
        missing = [step for step in due if step not in logged]
        wrong.append(f"logged steps: missing {missing[:5]}, doubled or extra {extra[:5]}")
    for name in ("flops", "trained_tokens"):
        totals = [row[name] for row in trained if name in row]
        if any(later < earlier for earlier, later in pairwise(totals)):
            wrong.append(f"{name} falls")
    yield _check("metrics", not wrong, "; ".join(wrong) or f"{len(rows)} rows, every logging step once")


def _predictions_add_up(directory: RunDirectory, result: Mapping[str, Any]) -> Iterator[Check]:
    """The reported accuracy is that of the predictions on disk."""
    for key, metrics in result["evaluation"].items():
        file = directory.predictions / f"{key}.jsonl"
        if "accuracy" not in metrics or not file.exists():
            continue
        items = read_predictions(file)
        correct = [item["correct"] for item in items if isinstance(item.get("correct"), bool)]
        if len(correct) != len(items) or not items:
            continue
        mean = sum(correct) / len(correct)
        same = mean == metrics["accuracy"]
        detail = f"{len(items)} predictions, accuracy {mean:.4f}" + (
            "" if same else f", reported {metrics['accuracy']:.4f}"
        )
        yield _check(f"{key}: predictions", same, detail)


def _reload(directory: RunDirectory, recipe: Recipe, parallel: ParallelConfig | None) -> tuple[Any, Any]:
    """What anybody gets who loads the run; where nothing was trained, the model as its recipe makes it."""
    if directory.checkpoint.exists():
        return load(directory.path, device=recipe.model.device, parallel=parallel)
    base, tokenizer = load_base(recipe.model.model_copy(update={"parallel": parallel}), seed=recipe.seed)
    model = prepare_model(base, recipe.model, recipe.lora, seed=recipe.seed)
    return attached_untrained(recipe, model).eval(), tokenizer


def _validation_again(
    model: Any, tokenizer: Any, recipe: Recipe, result: Mapping[str, Any], validation: Any, tolerance: float
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
        yield _check(f"{prefix}_loss", same, detail if not same else f"{loss!r} again")


def validation_loss(model: Any, tokenizer: Any, recipe: Recipe, rows: Any, skill: str | None) -> float:
    """As the trainer measures it during training: same rows, order, batches and sums."""
    collator = Collator(tokenizer.pad_token_id, ["example_id"])
    size, device = recipe.validation_batch_size, next(model.parameters()).device
    methods_of(model).evaluation.start_validation(skill)

    def forward(batch: Mapping[str, Any], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = model_inputs(batch)
        outputs = model(
            **inputs, num_items_in_batch=tokens, use_cache=False
        )  # as transformers' Trainer trains and validates
        return outputs.loss, outputs.logits

    def batches() -> Iterator[Mapping[str, Any]]:
        order = validation_order(rows)
        for start in range(0, len(rows), size):
            batch = collator([rows[i] for i in order[start : start + size]])
            yield {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    sums, _ = validation_sums(forward, batches())
    methods_of(model).evaluation.start_validation(None)
    return validation_metrics(sums, "eval")["eval_loss"]


def _task_again(
    model: Any,
    tokenizer: Any,
    directory: RunDirectory,
    task: EvalTask,
    result: Mapping[str, Any],
    tolerance: float,
    full: bool,
) -> Check:
    """A sample of a task's items, or all of them where the batches decide the last bits (perplexity)."""
    stored = read_predictions(directory.predictions / f"{task.key}.jsonl")
    reads_losses = task.task == "perplexity"
    if reads_losses and len(stored) > ROWS_AGAIN and not full:
        return _check(task.key, None, f"{len(stored)} rows: left to `headgate verify`")
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
    return _check(task.key, not wrong, detail)


def _item_difference(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> str | None:
    """The first field in which two predictions differ."""
    for name in old:
        if name in UNCOMPARED or name not in new:
            continue
        if not _agree(old[name], new[name], tolerance):
            return f"{name} was {_short(old[name])}, is {_short(new[name])}"
    return None


def _agree(old: Any, new: Any, tolerance: float) -> bool:
    if isinstance(old, float) and isinstance(new, (int, float)):
        both_nan = math.isnan(old) and math.isnan(new)
        return both_nan or old == new or math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() == new.keys() and all(_agree(old[k], new[k], tolerance) for k in old)
    if isinstance(old, Sequence) and not isinstance(old, str) and isinstance(new, Sequence):
        return len(old) == len(new) and all(_agree(a, b, tolerance) for a, b in zip(old, new, strict=True))
    return bool(old == new)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
