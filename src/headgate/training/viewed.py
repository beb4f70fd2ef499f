"""Batches that a method forms from the trainer's own: one long epoch of them, resumed exactly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import skip_first_batches
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_utils import has_length

from headgate.errors import ConfigError
from headgate.methods.compose import MethodStack
from headgate.methods.protocols import DataView, FormsBatches
from headgate.models.anatomy import Batch, Columns
from headgate.training import processes

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments

STATE_FILE = "batches.safetensors"


class ViewedBatches:
    """``length`` batches of a view over a data loader, which is gone round as often as that takes.

    Attributes:
        turn: passes over the loader's data that are complete. taken: batches of the current pass that the view
            has taken.
    """

    def __init__(self, loader: DataLoader[Batch], former: FormsBatches, length: int) -> None:
        self.loader, self.length = loader, length
        self.turn, self.taken = 0, 0
        self._per_turn = len(loader)
        view = former.data_view(self._raw(), lambda: self.turn)
        assert view is not None
        self.view: DataView = view

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[object]:
        return itertools.islice(iter(self.view), self.length)

    @property
    def epoch(self) -> float:
        """Passes over the offered data before the batch taken last, a fraction of the current one included."""
        return self.turn + max(0, self.taken - 1) / self._per_turn

    @property
    def passes(self) -> float:
        """Passes over the offered data, what was taken so far included."""
        return self.turn + self.taken / self._per_turn

    def _raw(self) -> Iterator[object]:
        while True:
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(self.turn)
            for batch in skip_first_batches(self.loader, self.taken) if self.taken else self.loader:
                self.taken += 1
                yield batch
            self.turn, self.taken = self.turn + 1, 0

    def save(self, folder: Path) -> None:
        """Where the loader stands, and the rows that the view holds back."""
        parts, counters = self.view.held()
        tensors = {
            f"{i}.{name}": value.cpu().contiguous()
            for i, part in enumerate(parts)
            for name, value in part.items()
            if isinstance(value, Tensor)
        }
        lists = [{k: v for k, v in part.items() if not isinstance(v, Tensor)} for part in parts]
        state = {"turn": self.turn, "taken": self.taken, "counters": counters, "lists": lists}
        save_file(tensors, folder / STATE_FILE, metadata={"state": json.dumps(state)})

    def load(self, folder: Path, device: torch.device) -> None:
        """Continue where ``save`` was called. Call before the first batch is drawn."""
        with safe_open(folder / STATE_FILE, framework="pt", device=str(device)) as file:
            state = json.loads(file.metadata()["state"])
            parts: list[Columns] = [dict(part) for part in state["lists"]]
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                index, _, name = key.partition(".")
                parts[int(index)][name] = file.get_tensor(key)
        self.turn, self.taken = state["turn"], state["taken"]
        self.view.restore(parts, state["counters"])


def formed_batches(
    loader: DataLoader[Batch], methods: MethodStack, args: TrainingArguments
) -> ViewedBatches | None:
    """The batches that a method forms from the trainer's ``loader``; None where no method does.

    One process only: ranks would form different numbers of them. Raises ConfigError where it cannot be.
    """
    forming = methods.data.batch_former()
    if forming is None:
        return None
    name, former = forming
    if processes.world_size() > 1:
        raise ConfigError(f"{name} forms its own batches, on one process only: run it without torchrun")
    if not has_length(loader):
        raise ConfigError(f"{name} goes round the data several times: give a data set of known length")
    if args.max_steps <= 0:
        raise ConfigError(
            f"{name} forms its own batches, so an epoch has no fixed number of them: set training.max_steps"
        )
    return ViewedBatches(loader, former, args.max_steps * args.gradient_accumulation_steps)
