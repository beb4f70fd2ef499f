"""Which column of a data file is asked and which one answers."""

from __future__ import annotations

from collections.abc import Mapping

from headgate.data.checks import first_rows
from headgate.data.config import SourceConfig
from headgate.errors import DataError

PROMPTS = (
    "prompt",
    "question",
    "instruction",
    "input",
    "query",
    "problem",
    "context",
    "source",
    "src",
    "title",
)
COMPLETIONS = (
    "completion", "answer", "output", "response", "target", "solution", "reply", "label", "summary", "tgt",
)  # fmt: skip


def columns_of(row: Mapping[str, object], data: str) -> tuple[dict[str, str], list[str]]:
    """A mapping of columns where the reader of ``auto`` does not know them, and what to say of it."""
    probe = SourceConfig(source="auto", path=data)
    try:
        first_rows(probe, data, 1)
    except DataError as error:
        if "fit no reader" not in str(error):
            raise
    else:
        return {}, [f"columns {', '.join(map(str, row))}, as the reader expects them"]
    texts = [str(key) for key, value in row.items() if isinstance(value, str)]
    lowered = {key.lower(): key for key in texts}
    answers = lowered | {
        str(key).lower(): str(key) for key, value in row.items() if type(value) in (int, float)
    }
    prompt = next((lowered[known] for known in PROMPTS if known in lowered), None)
    completion = next((answers[known] for known in COMPLETIONS if known in answers), None)
    if prompt is None and completion is None and len(texts) == 1:
        return {"text": texts[0]}, [f"column {texts[0]} taken as text"]
    if prompt is None or completion is None:
        raise DataError(
            f"--data {data}: which column is asked and which answers cannot be told from {', '.join(map(str, row)) or 'nothing'}: "
            "rename two of them to prompt and completion (or one to text), or write a recipe with columns: "
            "{prompt: ..., completion: ...}"
        )
    return {"prompt": prompt, "completion": completion}, [f"column {prompt} is asked, {completion} answers"]
