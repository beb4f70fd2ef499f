"""Checks that stop a run before it wastes time: missing gradients, a loss that is not a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError, TrainingError
from headgate.files import write_json
from headgate.models.anatomy import Batch
from headgate.training.processes import world_size

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainingArguments


def check_compile(args: TrainingArguments, methods: Sequence[str], sharded: bool) -> None:
    """``torch_compile`` runs for an adapter alone, in one process, on a whole base. Raises ConfigError elsewhere.

    Methods decide in Python which blocks run and what is learned from, and may install and take out parts of the model between
    steps; a graph compiled of one rank may leave a collective out that another rank runs. No test has shown either to be right;
    ``model.compile`` compiles what lies between these decisions.
    """
    if not getattr(args, "torch_compile", False):
        return
    where = ", ".join(methods) if methods else None
    if sharded:
        where = "a base sharded by model.parallel"
    elif world_size() > 1:
        where = f"{world_size()} ranks"
    if where is not None:
        cure = (
            ""
            if sharded
            else ", and set model.compile (load_model(compile='inductor')): attention and MLP by themselves"
        )
        raise ConfigError(f"torch_compile with {where} is not offered: leave torch_compile out{cure}")


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


class FiniteWatch:
    """Stops a run before a loss or gradient that is not finite reaches the weights, and says which rows it came from.

    On a CPU every value is read as it comes. On an accelerator reading would wait for the device at every step: there
    the values are read at logging steps and before a checkpoint is written.
    """

    def __init__(self, output_dir: str) -> None:
        self._output_dir = Path(output_dir)
        self._losses: list[tuple[Tensor, dict[str, object]]] = []
        self._norms: list[tuple[Tensor, list[dict[str, object]]]] = []
        self._window: list[dict[str, object]] = []

    def add_loss(self, loss: Tensor, step: int, batch: Batch) -> None:
        """The loss of a micro-batch of optimizer step ``step``."""
        ids = batch.get("example_id")
        fallback = {"input_ids_first_tokens": batch["input_ids"][:, :16].tolist()} if ids is None else {}
        rows = {"step": step, "example_id": _plain(ids), **fallback}
        self._window = [*(one for one in self._window if one["step"] == step), rows]
        self._losses.append((loss.detach(), rows))
        if loss.device.type == "cpu":
            self.check()

    def add_gradient_norm(self, norm: Tensor | float) -> None:
        """The norm of all gradients, before the optimizer's step on them."""
        self._norms.append((torch.as_tensor(norm).detach(), self._window))
        if self._norms[-1][0].device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise TrainingError, with the offending batches saved, if any value since the last check is not finite."""
        losses, norms, self._losses, self._norms = self._losses, self._norms, [], []
        bad = [
            rows for rows, finite in zip([r for _, r in losses], _finite(losses), strict=True) if not finite
        ]
        if bad:
            raise TrainingError(f"the loss is not finite at step {bad[0]['step']}: {self._saved(bad)}")
        for (_, rows), finite in zip(norms, _finite(norms), strict=True):
            if not finite:
                step = rows[0]["step"] if rows else "?"
                raise TrainingError(
                    f"the gradient is not finite at step {step}, so no optimizer step was taken on it: {self._saved(rows)}"
                )

    def _saved(self, batches: Sequence[Mapping[str, object]]) -> str:
        self._output_dir.mkdir(parents=True, exist_ok=True)
        path = self._output_dir / "nan_batches.json"
        write_json(path, {"batches": list(batches)})
        return f"the batch ids are in {path}. Lower the learning rate, or look at these rows"


def _finite(values: Sequence[tuple[Tensor, object]]) -> list[bool]:
    if not values:
        return []
    flags: list[bool] = torch.stack([torch.isfinite(value).all() for value, _ in values]).tolist()
    return flags


def require_finite_state(named: Mapping[str, nn.Parameter], optimizer: Optimizer, step: int) -> None:
    """Before a checkpoint is written: weights and optimizer moments are finite. Raises TrainingError naming the first
    that is not; a checkpoint of it would be the one that every restart begins from."""
    tensors = {f"weight {name}": parameter.detach() for name, parameter in named.items()}
    names = {id(parameter): name for name, parameter in named.items()}
    for parameter, state in (optimizer.state if optimizer is not None else {}).items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                tensors[f"optimizer {key} of {names.get(id(parameter), 'a parameter')}"] = value
    finite = _finite([(tensor, name) for name, tensor in tensors.items()])
    bad = [name for name, good in zip(tensors, finite, strict=True) if not good]
    if bad:
        raise TrainingError(
            f"{bad[0]} is not finite at step {step} ({len(bad)} of {len(tensors)} tensors): no checkpoint of it is "
            "written, run again to go on from the one before; lower the learning rate if it happens again"
        )


def _plain(ids: Tensor | Iterable[object] | None) -> Sequence[object] | None:
    if ids is None:
        return None
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
