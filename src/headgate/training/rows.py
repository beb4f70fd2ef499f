"""A user's own rows, looked at before the first step: what transformers would end in a traceback is told with its cure."""

from __future__ import annotations

from collections.abc import Mapping, Sized

from torch import Tensor
from torch.utils.data import ConcatDataset

from headgate.errors import DataError


def check_rows(dataset: object, sampling: str) -> None:
    """Raise DataError for data that no loader can be made of: none at all, or rows without lengths to group by."""
    for part in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
        if isinstance(part, Sized) and len(part) == 0:
            raise DataError("train_dataset is empty: give it at least one row")
        if part is None or isinstance(part, ConcatDataset):  # a stream of skills has an order of its own
            continue
        if sampling == "group_by_length" and not hasattr(part, "column_names"):
            raise DataError(
                f"train_sampling_strategy='group_by_length' reads the lengths of a datasets.Dataset, and train_dataset is a "
                f"{type(part).__name__}: use 'random', or make it a datasets.Dataset"
            )


def require_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """The batch's labels. Raises DataError where the collator made none."""
    if batch.get("labels") is None:
        raise DataError(
            f"the batches have no labels (they have {', '.join(batch)}): give the rows a column labels, or pass "
            "data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    return batch["labels"]
