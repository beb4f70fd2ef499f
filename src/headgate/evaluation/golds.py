"""The gold answers of rows, read without a model."""

from __future__ import annotations

from collections.abc import Sequence

from headgate.data.readers.base import RawRow
from headgate.errors import DataError
from headgate.evaluation.config import EvalTask


def gold_answers(rows: Sequence[RawRow], task: EvalTask) -> list[list[str]]:
    """Every row's gold answers: ``answers``, ``answer``, or a short completion. Raises DataError for a row without."""
    golds = []
    for row in rows:
        several = row.get("answers") or ([row["answer"]] if row.get("answer") is not None else None)
        if several is None and row.get("messages") is not None and row["messages"][-1]["role"] == "assistant":
            several = [row["messages"][-1]["content"]]
        if several is None or not (row.get("prompt") is not None or row.get("messages") is not None):
            raise DataError(
                f"task {task.task} needs rows with a prompt and an answer; row '{row['example_id']}' of source "
                f"{task.source!r} has {', '.join(name for name, value in row.items() if value is not None)}: map them with "
                "columns: {prompt: ..., completion: ..., answer: ...}"
            )
        golds.append([str(gold) for gold in several])
    return golds
