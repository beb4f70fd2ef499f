"""Is a run what it saved? What is on disk is loaded again, as anybody would, and measured again.

    reported validation loss  ==  validation loss of what was saved, to the last bit
    reported predictions      ==  predictions of what was saved, item by item

Every run does this at its end, on all of its validation rows and a sample of every evaluation; ``headgate verify`` does
more of it, later, in another process. On the machine that made the run every figure must agree bitwise; elsewhere
(other versions, processor, number of threads) within ``ELSEWHERE``, and it is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from headgate.errors import DamagedFile, HeadgateError
from headgate.evaluation.predictions import read_predictions
from headgate.experiments.environment import environment
from headgate.experiments.inputs import changed_inputs, input_digests
from headgate.experiments.measured_again import check, task_again, validation_again
from headgate.experiments.recipe import Recipe
from headgate.experiments.records import Check, RunRecord, Verification
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.untrained import attached_untrained
from headgate.files import digest, read_json
from headgate.models.config import ParallelConfig
from headgate.models.load import load_base, prepare_model
from headgate.training import checkpoint
from headgate.training.saved import load

ELSEWHERE = 1e-3
"""Relative difference allowed between machines, where sums are taken in another order."""


def verification(
    directory: RunDirectory,
    result: RunRecord,
    validation: object,
    *,
    full: bool = False,
    parallel: ParallelConfig | None = None,
) -> Verification:
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
        checks.append(check("reload", False, f"what was saved cannot be loaded: {error}"))
    else:
        tolerance = 0.0 if elsewhere is None else ELSEWHERE
        checks += validation_again(model, tokenizer, recipe, result, validation, tolerance)
        for task in recipe.evaluation:
            checks.append(task_again(model, tokenizer, directory, task, result, tolerance, full))
    return {
        "verified": all(line["ok"] is not False for line in checks),
        "form": "full" if full else "short",
        "machine": elsewhere or "the one that made the run",
        "checks": checks,
    }


def verify_run(directory: RunDirectory) -> Verification:
    """The full record of a complete run, its files and inputs included."""
    from headgate.experiments.prepared import prepare_run

    result = directory.result()
    recipe = directory.recipe()
    checks = [_files(directory), _saved_folder(directory), _inputs(directory, recipe)]
    prepared = prepare_run(recipe)
    prepared.release_model()
    record = verification(directory, result, prepared.validation, full=True)
    record["checks"] = [*checks, *record["checks"]]
    record["verified"] = all(line["ok"] is not False for line in record["checks"])
    return record


def failures(record: Verification) -> list[str]:
    """What differs, a line each."""
    return [f"{line['name']}: {line['detail']}" for line in record["checks"] if line["ok"] is False]


def machine_difference(directory: RunDirectory) -> str | None:
    """What of this machine can change the last bits of a sum, against the run's; None where nothing does."""
    made: Mapping[str, Any] = directory.environment()
    here: Mapping[str, Any] = environment()
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


def _files(directory: RunDirectory) -> Check:
    """Every file of the run's manifest is there and is what was written."""
    if not directory.manifest_file.exists():
        return check("files", None, "this run has no manifest (made by an earlier version)")
    try:
        files = read_json(directory.manifest_file)["files"]
    except (DamagedFile, KeyError) as error:
        return check("files", False, str(error))
    wrong = [
        f"{name} {'has changed' if (directory.path / name).exists() else 'is missing'}"
        for name, written in files.items()
        if not (directory.path / name).exists() or digest(directory.path / name) != written
    ]
    return check("files", not wrong, ", ".join(wrong) or f"{len(files)} files as they were written")


def _saved_folder(directory: RunDirectory) -> Check:
    if not directory.checkpoint.exists():
        trained = directory.result()["training"]["steps"] > 0
        return check(
            "checkpoint", not trained, "missing" if trained else "nothing was trained, so nothing was saved"
        )
    wrong = checkpoint.damage(directory.checkpoint)
    return check("checkpoint", wrong is None, wrong or "whole, unharmed and finite")


def _inputs(directory: RunDirectory, recipe: Recipe) -> Check:
    if not directory.inputs_file.exists():
        return check(
            "inputs", None, "this run recorded no digests of its inputs (made by an earlier version)"
        )
    before = read_json(directory.inputs_file)
    changed = changed_inputs(before, input_digests(recipe))
    return check(
        "inputs", not changed, f"changed: {', '.join(changed)}" if changed else f"{len(before)} as they were"
    )


def _continuity(directory: RunDirectory, recipe: Recipe, result: RunRecord) -> Iterator[Check]:
    """``metrics.jsonl`` tells one undisturbed run: no torn line, no step twice, none missing, totals that only grow."""
    steps = result["training"]["steps"]
    if steps == 0:
        return
    if recipe.entry is not None:
        yield check("metrics", None, "trained by the recipe's entry, which logs as it likes")
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
    yield check("metrics", not wrong, "; ".join(wrong) or f"{len(rows)} rows, every logging step once")


def _predictions_add_up(directory: RunDirectory, result: RunRecord) -> Iterator[Check]:
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
        yield check(f"{key}: predictions", same, detail)


def _reload(directory: RunDirectory, recipe: Recipe, parallel: ParallelConfig | None) -> tuple[Any, Any]:
    """What anybody gets who loads the run; where nothing was trained, the model as its recipe makes it."""
    if directory.checkpoint.exists():
        return load(directory.path, device=recipe.model.device, parallel=parallel)
    base, tokenizer = load_base(recipe.model.model_copy(update={"parallel": parallel}), seed=recipe.seed)
    model = prepare_model(base, recipe.model, recipe.lora, seed=recipe.seed)
    if recipe.data.chat_template is not None:  # a trained run saved it with its tokenizer
        tokenizer.chat_template = recipe.data.chat_template
    return attached_untrained(recipe, model).eval(), tokenizer
