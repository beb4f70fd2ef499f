"""An evaluation task's data, read and checked before a model is loaded."""

from __future__ import annotations

import difflib
from pathlib import Path

from headgate.data.checks import first_rows, local
from headgate.errors import ConfigError, DataError
from headgate.evaluation.config import ABILITIES, CODE_TASKS, NAMED, EvalTask
from headgate.evaluation.golds import gold_answers
from headgate.evaluation.scorers import check_golds, suited

KNOWN = ("exact_match", "perplexity", *NAMED, ABILITIES)


def check_task(task: EvalTask, *, whole: bool = True) -> None:
    """Raise DataError or ConfigError for data that the task cannot be measured on, and golds that cannot be matched.

    ``whole``: every row; else the first ones, and hub data is not fetched. Tasks of lm-evaluation-harness are checked
    when they run.
    """
    if task.task == ABILITIES:
        return
    if task.task not in KNOWN:
        close = difflib.get_close_matches(task.task, KNOWN, n=1, cutoff=0.8)
        if close and not Path(task.task).exists():
            raise ConfigError(f"evaluation: unknown task {task.task!r}: did you mean {close[0]!r}?")
        return
    key = f"evaluation {task.key}"
    source = task.source_config()
    if whole:
        from headgate.data.sources import load_rows

        rows = list(load_rows(source)) if task.task != "perplexity" else load_rows(source).select(range(1))
    elif local(source):
        rows = first_rows(source, key)
    else:
        first_rows(source, key)
        return
    if task.task == "perplexity" or task.task in CODE_TASKS:
        return
    options = [row.get("choices") or () for row in rows]
    if task.mode == "likelihood":
        if not all(options):
            raise DataError(
                f"{key}: mode: likelihood needs rows with choices; source {task.source!r} has none"
            )
        return
    golds = gold_answers(rows, task)
    primary = task.scorer or suited(
        [several[0] for several in golds],
        [str(row.get("completion") or "") for row in rows],
        choices=all(options),
        rationale=task.style == "rationale",
    )
    check_golds(primary, golds, options, [row["example_id"] for row in rows])
