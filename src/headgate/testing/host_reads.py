"""The law of host copies: how often a micro-batch makes Python wait for a number.

Each wait stops the queue of an accelerator. On a CPU they cost nothing, so they are counted on a virtual device, in code of
Headgate and of the method; what lives on the host on purpose (counters, thresholds) is read for nothing.
"""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import headgate
from headgate.testing.case import Case
from headgate.testing.law import law
from headgate.testing.virtual_device import VirtualDevice

HEADGATE = Path(headgate.__file__).parent
READS = {"backward_gate": 1.25, "layer_routing": 1.0, "schema_bank": 0.0, "lora_experts": 0.0, "ewc": 0.0}
"""A micro-batch's reads beyond those of the adapter alone under the same loss, as they are; lower a number when a read goes.
The gate's quarter is its basis that fills: a direction is added where what is left of a sketch has a length.

A method of one's own may say what it needs in a class attribute ``host_reads``."""
STRANGER = 1.0


def on_device(methods: nn.Module) -> list[Tensor]:
    """The state of the methods, but for what they keep on the host on purpose."""
    return [
        tensor
        for module in methods.modules()
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None and name not in getattr(module, "stays_on_cpu", ())
    ]


def reads_of(
    case: Case, *, alone: bool = False, loss: str = "auto"
) -> tuple[float, Counter[str], Counter[str]]:
    """Reads of a micro-batch, its share of the optimizer step included, where they stand in all eight that are counted, and
    the blocking uploads; no logging, no saving."""
    quiet = {"training.eval_every": 1000, "training.save_every": 1000, "logging_every": 1000}
    changes = {**quiet, "training.gradient_accumulation_steps": 2, "training.loss": loss}
    trainer = case.trainer(changes, alone=alone)
    own = Path(inspect.getfile(case.kind)).parent
    device, steps = VirtualDevice((HEADGATE, own)), 0
    original = trainer.training_step

    def step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        # the first window builds what it keeps, and the last ones end the run
        if not 2 < steps <= 10:
            return original(*args)
        assert trainer.model is not None
        device.put(trainer.model.state_dict(), on_device(trainer.methods), args[1])
        with device.watching():
            return original(*args)

    trainer.training_step = step  # type: ignore[method-assign, assignment]  # counted, then as it was
    trainer.train()
    assert steps >= 10, f"{steps} micro-batches are too few to count in"
    return sum(device.places.values()) / 8, device.places, device.uploads


@law
def host_reads_stay_within_budget(case: Case) -> None:
    """A micro-batch reads no more numbers back than the method's budget, beyond what the adapter alone reads."""
    ours, places, _ = reads_of(case, loss="chunked")  # a method may ask for it: its own read is no method's
    plain, _, _ = reads_of(case, alone=True, loss="chunked")
    budget = getattr(case.kind, "host_reads", READS.get(case.name, STRANGER))
    most = ", ".join(f"{place} {count / 8:g}" for place, count in places.most_common(6))
    assert ours - plain <= budget, (
        f"{ours - plain:g} reads a micro-batch, the budget is {budget:g} (the adapter alone: {plain:g}): {most}"
    )
