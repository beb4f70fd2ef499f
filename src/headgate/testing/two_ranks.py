"""The law of data-parallel training: two ranks come to what one process comes to at the same global batch.

Ranks that are only compared with each other agree in being wrong: sums for means, OR for AND. So both are compared with one
process. A method that decides per micro-batch sees two micro-batches there where the ranks see one of twice the rows: what
one process does with either cut of the global batch is right.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.errors import ConfigError, HeadgateError
from headgate.methods.base import Method
from headgate.methods.names import METHODS
from headgate.methods.registry import register_method
from headgate.testing.case import Case, NotApplicable, differing
from headgate.testing.law import law
from headgate.training import processes
from headgate.training.trainer import HeadgateTrainer

if TYPE_CHECKING:
    from transformers import Trainer

SAME = {
    "training.max_steps": 4,
    "training.eval_every": 1000,
    "lora.dropout": 0.0,
    "data.group_by_length": False,
}
CUTS = (
    {"training.gradient_accumulation_steps": 2},
    {"training.per_device_train_batch_size": 4},
)
"""The global batch of two ranks in one process: in two micro-batches, or whole."""
CLOSE = 1e-5
"""A method of one's own may say what it needs in a class attribute ``rank_tolerance``."""


@law
def two_ranks_are_one_process(case: Case) -> None:
    """Two gloo ranks end with bitwise the same weights, and those are one process's at the same global batch, to rounding."""
    changes = {
        key: value for key, value in SAME.items() if not (case.kind.is_adapter and key.startswith("lora."))
    }
    try:
        (one, norms), (other, _) = _on_two_ranks(case, changes)
    except ConfigError as refusal:
        if "process" in str(refusal) and case.name in str(refusal):
            raise NotApplicable(f"refused by name on several ranks: {refusal}") from None
        raise
    wrong = differing(one, other)
    assert not wrong, f"the two ranks differ in {wrong[:4]}"
    tolerance = getattr(case.kind, "rank_tolerance", CLOSE)
    gaps = []
    for cut in CUTS:
        alone = case.trained({**changes, **cut})
        gaps.append((*_furthest(one, _trained(alone)), _norms(alone)))
    gap, name, expected = min(gaps, key=lambda g: g[0])
    assert gap <= tolerance, f"two ranks are {gap:.3g} from one process in {name} (at most {tolerance:g})"
    # AdamW divides a gradient by its own size: a sum in place of a mean moves no weight, and shows here
    near = len(norms) == len(expected) and all(
        abs(a - b) <= max(1e-3, 10 * tolerance) * abs(b) for a, b in zip(norms, expected, strict=True)
    )
    assert near, f"gradient norms of two ranks {norms}, of one process {expected}"


def _trained(trainer: HeadgateTrainer) -> dict[str, Tensor]:
    """What the optimizer moved; running figures follow the cut of the batch and are left out."""
    return {name: tensor.detach().clone() for name, tensor in trainer.named_trainable.items()}


def _norms(trainer: Trainer) -> list[float]:
    """The norm of every optimizer step's gradient, before it is clipped."""
    return [float(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]


def _furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    assert one.keys() == other.keys(), f"other tensors train: {sorted(one.keys() ^ other.keys())[:4]}"
    gaps = {
        name: float((one[name].double() - other[name].double()).abs().max())
        for name in one
        if one[name].numel()
    }
    name = max(gaps, key=lambda key: gaps[key])
    return gaps[name], name


def _on_two_ranks(case: Case, changes: Mapping[str, object]) -> list[tuple[dict[str, Tensor], list[float]]]:
    """Trained tensors and gradient norms of either rank. Raises what rank 0 raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = case.folder / "ranks"
    folder.mkdir(parents=True)
    context = torch.multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, port, case.kind, case, dict(changes), str(folder)))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    for rank, process in enumerate(ranks):
        said = folder / f"{rank}.error"
        if said.exists():
            raise pickle.loads(said.read_bytes())  # written by our own process, below a folder of our own
        assert process.exitcode is not None, f"rank {rank} hangs"
        assert process.exitcode == 0, f"rank {rank} ended with exit code {process.exitcode}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def _rank(
    rank: int, port: int, kind: type[Method], case: Case, changes: dict[str, object], folder: str
) -> None:
    """One rank, in a process of its own with a folder of its own."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    if kind.name not in METHODS.names():
        register_method(kind)
    processes.join("cpu")
    own = Case(case.name, case.options, Path(folder) / f"run-{rank}", case.model, case.others)
    try:
        trainer = own.trained(changes)
        torch.save((_trained(trainer), _norms(trainer)), f"{folder}/{rank}.pt")
    except HeadgateError as error:
        Path(f"{folder}/{rank}.error").write_bytes(pickle.dumps(error))
    finally:
        processes.leave()
