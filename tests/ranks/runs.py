"""Runs of one recipe on one or several ranks, through the command line, and what they came to.

The ranks are forked from a server that has imported everything once, with the variables that torchrun would set, so that
a run of two ranks takes seconds. ``test_launch`` starts them as users do.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from headgate.cli import main as command_line
from headgate.experiments import run as run_module
from headgate.experiments.run_directory import RunDirectory
from tests.faults.runs import recipe_of

TIMES = ("seconds", "per_second", "runtime", "milliseconds", "memory_peak", "elapsed_seconds")
APART = ("run_id", "hardware", "versions", "verification")
"""Of results: what differs between recipes of unlike accumulation, or tells where and how it was run."""


PATIENCE = 540
"""Seconds after which a run hangs: a machine that does much else needs minutes for what takes one alone."""


@dataclass
class Ended:
    """``exit`` code and ``text`` of every rank, and the run's directory (None if there is none)."""

    exits: list[int]
    texts: list[str]
    directory: RunDirectory | None
    digests: list[dict[str, str]] = field(default_factory=list)
    """Of every rank: trained tensors, optimizer moments and state of the methods."""
    trained: frozenset[str] = frozenset()

    @property
    def said(self) -> list[str]:
        """Lines that speak of an error or an interruption, on all ranks."""
        lines = [line for text in self.texts for line in text.splitlines()]
        return [line for line in lines if line.startswith(("error", "interrupted", "Traceback"))]


class Strike(TrainerCallback):
    """At the end of an optimizer step: a signal to this process, or an exception in it; at the end, a digest."""

    def __init__(self, trainer: Any, step: int, what: str, digest: Path) -> None:
        self.trainer, self.step, self.what, self.digest = trainer, step, what, digest

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step and self.what:
            if self.what == "error":
                raise RuntimeError("the machine went away")
            os.kill(os.getpid(), getattr(signal, self.what))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        tensors = {**trainer.named_trainable, **trainer.methods.state_dict()}
        for name, parameter in trainer.named_trainable.items():
            moments = trainer.optimizer.state.get(parameter, {})
            tensors |= {f"{name} {key}": value for key, value in moments.items()}
        own = [name for name, _ in trainer.methods.named_parameters()]
        digests = {name: _digest(tensor) for name, tensor in tensors.items()}
        self.digest.write_text(json.dumps({"digests": digests, "trained": own}))


def _digest(tensor: Any) -> str:
    data = torch.as_tensor(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _rank(
    arguments: Sequence[str], rank: int, world: int, port: int, folder: str, step: int, what: str
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE - 10, file=open(f"{folder}/hangs-{rank}.txt", "w"))  # noqa: SIM115
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )  # fmt: skip
    text = open(f"{folder}/rank-{rank}.txt", "w")  # noqa: SIM115 (for the life of the process)
    os.dup2(text.fileno(), 1)
    os.dup2(text.fileno(), 2)
    sys.stdout = sys.stderr = text
    make_trainer = run_module.make_trainer

    def watched(*given: Any) -> Any:
        trainer = make_trainer(*given)
        trainer.add_callback(Strike(trainer, step, what, Path(f"{folder}/digest-{rank}.json")))
        return trainer

    run_module.make_trainer = watched
    sys.argv = ["headgate", *arguments]
    try:
        command_line.main()
    finally:
        text.flush()


def train(
    recipe: Path,
    world: int,
    *changes: str,
    at: Mapping[int, tuple[int, str]] | None = None,
    flags: Sequence[str] = (),
) -> Ended:
    """``headgate train recipe --set change ...`` on ``world`` ranks; ``at``: rank -> (step, signal or "error")."""
    folder = recipe.parent
    for old in folder.glob("digest-*.json"):
        old.unlink()
    arguments = ["train", str(recipe), *(part for change in changes for part in ("--set", change)), *flags]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.runs"])
    ranks = [
        context.Process(
            target=_rank, args=(arguments, rank, world, port, str(folder), *(at or {}).get(rank, (0, "")))
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
    exits = [process.exitcode for process in ranks]
    texts = [(folder / f"rank-{rank}.txt").read_text() for rank in range(world)]
    hanging = [(folder / f"hangs-{rank}.txt").read_text() for rank in range(world)]
    assert -signal.SIGKILL not in exits or at, f"hangs: {exits}\n" + "\n".join(hanging + texts)
    assert None not in exits, f"hangs: {exits}\n" + "\n".join(hanging + texts)
    made = sorted((folder / "runs" / "fault").glob("*/recipe.yaml"))
    ends = [json.loads(path.read_text()) for path in sorted(folder.glob("digest-*.json"))]
    directory = RunDirectory(made[0].parent) if made else None
    digests, trained = [end["digests"] for end in ends], {name for end in ends for name in end["trained"]}
    return Ended(exits, texts, directory, digests, frozenset(trained))  # type: ignore[arg-type]


def weights(directory: RunDirectory) -> dict[str, torch.Tensor]:
    """Every saved tensor."""
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(directory.checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def furthest(one: Ended, other: Ended) -> tuple[float, str]:
    """The largest difference between trained tensors of two runs, and where it is; running figures are left out."""
    assert one.directory is not None and other.directory is not None
    a, b = weights(one.directory), weights(other.directory)
    assert a.keys() == b.keys()
    a = {n: t for n, t in a.items() if n.startswith(("adapter", "model")) or n.split(":")[1] in one.trained}
    gaps = {name: float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel()}
    assert gaps
    name = max(gaps, key=lambda key: gaps[key])
    return gaps[name], name


def figures(content: Any, place: str = "") -> dict[str, Any]:
    """Every figure of a result or a log by its path, but for times and what tells where it was run."""
    if isinstance(content, dict):
        items = {k: v for k, v in content.items() if not k.endswith(TIMES) and k not in APART}
        return {k: v for key, part in items.items() for k, v in figures(part, f"{place}/{key}").items()}
    if isinstance(content, list):
        return {k: v for i, part in enumerate(content) for k, v in figures(part, f"{place}/{i}").items()}
    return {place: content}


def unlike(one: Any, other: Any, tolerance: float) -> list[str]:
    """Where two results or logs differ by more than ``tolerance``, relative to what is larger than one."""
    a, b = figures(one), figures(other)
    different = [f"{key} is only in one" for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys():
        x, y = a[key], b[key]
        if isinstance(x, float) and isinstance(y, (int, float)):
            same = x == y or abs(x - y) <= tolerance * max(1.0, abs(x)) or (x != x and y != y)
        else:
            same = x == y
        if not same:
            different.append(f"{key}: {x} | {y}")
    return sorted(different)


__all__ = ["Ended", "figures", "furthest", "recipe_of", "train", "unlike", "weights"]
