"""The law of host copies: how often a micro-batch makes Python wait for a number.

``item``, ``tolist``, ``numpy``, ``cpu``, ``float(tensor)``, ``if tensor``: on an accelerator each waits until all work
queued so far is done. On a CPU they cost nothing, so they are counted here where they stand, in code of Headgate or of
the method, tensors that live on the CPU on purpose (counters, thresholds) included: a bound on what a GPU would feel.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import headgate
from headgate.testing.case import Case
from headgate.testing.law import law

HEADGATE = Path(headgate.__file__).parent
READERS = ("tolist", "numpy", "cpu")
"""Methods of a tensor that reach no operator on a CPU; ``item`` and its kin do (``aten::_local_scalar_dense``)."""
READS = {"backward_gate": 16.0, "layer_routing": 2.0, "schema_bank": 0.0, "lora_experts": 3.0, "ewc": 1.5}
"""A micro-batch's reads beyond those of the adapter alone, as they are; lower a number when a read goes.

A method of one's own may say what it needs in a class attribute ``host_reads``."""
STRANGER = 1.0


class Reads(TorchDispatchMode):
    """Counts reads by ``file:line`` of the innermost frame that is the library's or the method's own."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        super().__init__()
        self.folders = tuple(f"{folder}/" for folder in folders)
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.record()
        return func(*args, **(kwargs or {}))

    def record(self) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if file != __file__ and file.startswith(self.folders):
                self.places[f"{Path(file).name}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Reads inside are counted."""
        originals = {name: getattr(torch.Tensor, name) for name in READERS}

        def counted(original: Any) -> Any:
            def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.record()
                return original(tensor, *args, **kwargs)

            return read

        try:
            for name, original in originals.items():
                setattr(torch.Tensor, name, counted(original))
            with self:
                yield
        finally:
            for name, original in originals.items():
                setattr(torch.Tensor, name, original)


def reads_of(case: Case, *, alone: bool = False) -> tuple[float, Counter[str]]:
    """Reads of a micro-batch, its share of the optimizer step included, and where they stand; no logging, no saving."""
    quiet = {"training.eval_every": 1000, "training.save_every": 1000, "logging_every": 1000}
    trainer = case.trainer({**quiet, "training.gradient_accumulation_steps": 2}, alone=alone)
    own = Path(inspect.getfile(case.kind)).parent
    reads, steps = Reads((HEADGATE, own)), 0
    original = trainer.training_step

    def step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        # the first window builds what it keeps, and the last ones end the run
        if not 2 < steps <= 10:
            return original(*args)
        with reads.counting():
            return original(*args)

    trainer.training_step = step
    trainer.train()
    assert steps >= 10, f"{steps} micro-batches are too few to count in"
    return sum(reads.places.values()) / 8, reads.places


@law
def host_reads_stay_within_budget(case: Case) -> None:
    """A micro-batch reads no more numbers back than the method's budget, beyond what the adapter alone reads."""
    plain, _ = reads_of(case, alone=True)
    ours, places = reads_of(case)
    budget = getattr(case.kind, "host_reads", READS.get(case.name, STRANGER))
    most = ", ".join(f"{place} {count / 8:g}" for place, count in places.most_common(6))
    assert ours - plain <= budget, (
        f"{ours - plain:g} reads a micro-batch, the budget is {budget:g} (the adapter alone: {plain:g}): {most}"
    )
