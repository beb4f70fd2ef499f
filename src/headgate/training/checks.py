"""Checks that stop a run before it wastes time: missing gradients, a loss that is not a number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headgate.errors import TrainingError


def require_gradients(named: Mapping[str, nn.Parameter], stage: str) -> None:
    """After the first backward of a stage, every tensor that it trains has a gradient."""
    missing = [
        name for name, parameter in named.items() if parameter.requires_grad and parameter.grad is None
    ]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise TrainingError(
            f"stage {stage!r}: no gradient reached {shown}. The tensor is not on the path to the loss: with activation "
            "checkpointing use use_reentrant=False; otherwise freeze it or take it out of the stage's `train`"
        )


class NanWatch:
    """Remembers recent losses with their batch ids; on a GPU they are read at logging steps only."""

    def __init__(self, output_dir: str) -> None:
        self._output_dir, self._recent = Path(output_dir), []

    def add(self, loss: Tensor, step: int, batch: Mapping[str, Any]) -> None:
        ids = batch.get("example_id")
        fallback = {"input_ids_first_tokens": batch["input_ids"][:, :16].tolist()} if ids is None else {}
        self._recent.append((loss.detach(), {"step": step, "example_id": _plain(ids), **fallback}))
        if loss.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise TrainingError, with the offending batches saved, if any recent loss is NaN or infinite."""
        if not self._recent:
            return
        finite = torch.stack([torch.isfinite(loss).all() for loss, _ in self._recent]).tolist()
        bad = [batch for (_, batch), good in zip(self._recent, finite, strict=True) if not good]
        self._recent.clear()
        if bad:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            path = self._output_dir / "nan_batches.json"
            path.write_text(json.dumps(bad, indent=1))
            raise TrainingError(
                f"the loss is not finite at step {bad[0]['step']}: the batch ids are in {path}. Lower the learning rate, or look at these rows"
            )


def _plain(ids: Any) -> Sequence[Any] | None:
    if ids is None:
        return None
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
