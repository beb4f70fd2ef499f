"""TrainingArguments of the tests: quiet, on the CPU, and rows keep their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def arguments_in(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        **options,
    )
