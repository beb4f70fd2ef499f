"""Telemetry: one list of names, the same in JSONL, TensorBoard, trackio and W&B."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from headgate.files import write_lines_atomically

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

NAMES = [  # what a trainer logs whatever its methods; those declare theirs in Method.telemetry_names
    "loss",
    "loss_all",
    "loss/<part>",
    "learning_rate",
    "learning_rate/<group>",
    "grad_norm",
    "grad_norm/<group>",
    "epoch",
    "stage",
    "stage_step",
    "tokens_per_second",
    "trained_tokens",
    "padding_fraction",
    "packed_sequence_length_histogram",
    "flops",
    "memory_peak",
    "eval_loss",
    "eval_<skill>_loss",
    "eval_<part>",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
    "train_loss",
]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\w+>", r"[^\\s]+", re.escape(name).replace(r"\<", "<").replace(r"\>", ">")))


_PATTERNS = [_pattern(name) for name in NAMES]


def is_known(name: str, declared: Iterable[str] = ()) -> bool:
    """Whether ``name`` is one of the trainer's telemetry names, or of those that its methods declare."""
    own = [_pattern(given) for given in declared]
    return any(pattern.fullmatch(name) for pattern in (*_PATTERNS, *own))


class Telemetry:
    """Means over the micro-batches since the last log. Tensors are read once, at the logging step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._latest: dict[str, object] = {}

    def add(self, values: Mapping[str, object]) -> None:
        """Average numbers and scalar tensors; keep the latest of anything else (lists, histograms)."""
        for name, value in values.items():
            if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
                self._sums[name] = self._sums[name] + (
                    value.detach().float().reshape(()) if isinstance(value, Tensor) else value
                )
                self._counts[name] += 1
            else:
                self._latest[name] = value

    def set(self, name: str, value: object) -> None:
        """A value that is not averaged: totals, rates, thresholds at this moment."""
        self._latest[name] = value

    def flush(self) -> dict[str, object]:
        """Everything since the last flush as plain JSON values."""
        out: dict[str, object] = {
            name: float(total) / self._counts[name] for name, total in self._sums.items()
        }
        out.update({name: _plain(value) for name, value in self._latest.items()})
        self._sums.clear()
        self._counts.clear()
        self._latest.clear()
        return out

    def state(self) -> dict[str, Any]:
        """What the next ``flush`` would average and show, as JSON: a resumed run logs what an undisturbed one does."""
        sums = {name: [_number(total), self._counts[name]] for name, total in self._sums.items()}
        return {"sums": sums, "latest": {name: _plain(value) for name, value in self._latest.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        for name, (total, count) in state.get("sums", {}).items():
            # as the fp32 scalar that it was: a Python float would be added to with more digits
            self._sums[name] = total if isinstance(total, float) else torch.tensor(total["fp32"])
            self._counts[name] = count
        self._latest.update(state.get("latest", {}))


def _number(total: Tensor | float) -> float | dict[str, float]:
    return {"fp32": float(total)} if isinstance(total, Tensor) else float(total)


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else value


class JsonlCallback(TrainerCallback):
    """Every log as one line of ``metrics.jsonl``.

    A resumed run writes the file again from the log history of its checkpoint: whatever a kill, a second log at the
    same step or a torn line left there, the file is that of an undisturbed run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_lines_atomically(self.path, (_line(row) for row in state.log_history))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a") as file:
            file.write(_line({**logs, "step": state.global_step}))


def _line(row: Mapping[str, object]) -> str:
    return json.dumps({"step": row["step"], **row}) + "\n"


def gradient_norms(groups: Mapping[str, list[torch.nn.Parameter]]) -> dict[str, Tensor]:
    """``grad_norm/<group>``: 2-norm of all gradients of a group."""
    norms = {}
    for name, parameters in groups.items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            norms[f"grad_norm/{name}"] = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
            )
    return norms
