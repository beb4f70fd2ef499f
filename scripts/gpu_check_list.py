"""The checks of ``gpu_checks.py``: each trains something small on the device and says what it saw, or raises."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

import headgate.testing.conformance  # noqa: F401  # enters the partners' settings
from headgate.testing.case import Case, losses_of, weights_of
from headgate.testing.laws_of_pairs import PARTNERS

Figures = Mapping[str, Any]
METHODS = ("lora", "schema_bank", "layer_routing", "lora_experts", "backward_gate")
STEPS = 20
FP32 = {"cuda": 2e-3, "cpu": 0.0}
"""Largest relative difference of a loss from the CPU's: other kernels add in another order, 20 steps carry it on."""
BENCHES = ("bank", "gate", "routing", "experts", "trainer")


class NotHere(Exception):
    """This machine cannot run the check; the message says why."""


@dataclass(frozen=True)
class Machine:
    """The device under examination and a folder of one check's own."""

    device: str
    folder: Path

    def case(self, method: str, model: str = "random:llama", **options: Any) -> Case:
        name = "schema_bank" if method == "lora" else method
        return Case(name, {**PARTNERS[name], **options}, self.folder, model)

    def losses(
        self, method: str, device: str | None = None, model: str = "random:llama", **changes: Any
    ) -> list[float]:
        """Of 20 optimizer steps with dotted changes, ``__`` for a dot."""
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        settings = {
            "model.dtype": "float32",
            "training.max_steps": STEPS,
            "training.save_every": STEPS,
            **dotted,
        }
        settings["model.device"] = device or self.device
        trained = self.case(method, model).trained(settings, alone=method == "lora")
        found = losses_of(trained)
        assert found and all(map(math.isfinite, found)), f"losses {found}"
        return found

    def needs_cuda(self) -> None:
        if self.device != "cuda":
            raise NotHere("needs a GPU")


def apart(one: list[float], other: list[float]) -> float:
    """Largest relative difference of two runs' losses."""
    assert len(one) == len(other), f"{len(one)} losses against {len(other)}"
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(one, other, strict=True))


def same(method: str, machine: Machine, **changes: Any) -> Figures:
    """Trained on the CPU and on the device from one seed: the same losses."""
    ours, cpu = machine.losses(method, **changes), machine.losses(method, "cpu", **changes)
    difference = apart(ours, cpu)
    assert difference <= FP32[machine.device], (
        f"losses differ by {difference:.2g} of their size: {ours} against {cpu}"
    )
    return {"largest_relative_difference": difference, "first_loss": ours[0], "last_loss": ours[-1]}


def bf16(method: str, machine: Machine) -> Figures:
    """In bfloat16 the loss falls, and is within 5% of fp32's on average."""
    machine.needs_cuda()
    half, full = machine.losses(method, model__dtype="bfloat16"), machine.losses(method)
    mean = abs(sum(half) - sum(full)) / sum(full)
    assert half[-1] < half[0] and mean < 0.05, f"losses {half}, fp32 {full}"
    return {"mean_relative_difference": mean, "last_loss": half[-1]}


def resumed(method: str, machine: Machine) -> Figures:
    """Resumed from the middle, a run ends with the weights of the undisturbed one."""
    case, alone = machine.case(method), method == "lora"
    changes = {"model.device": machine.device, "model.dtype": "float32", "training.max_steps": 6}
    whole = case.trained(changes, alone=alone)
    again = case.trainer(changes, alone=alone)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    ends = zip(weights_of(whole).values(), weights_of(again).values(), strict=True)
    difference = max(float((a.float() - b.float()).nan_to_num(0).abs().max()) for a, b in ends if a.numel())
    assert difference <= (1e-6 if machine.device == "cuda" else 0.0), f"weights differ by {difference:.2g}"
    return {"largest_weight_difference": difference}


def killed(machine: Machine) -> Figures:
    """``kill -9`` after the first checkpoint, the same command again: the result of a run that was left alone."""
    recipe = machine.case("layer_routing").recipe({"model.device": machine.device, "model.dtype": "float32"})
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    content["training"] |= {"max_steps": 12, "save_every": 1}
    ends = []
    for name in ("left alone", "killed"):
        content["output_dir"] = str(machine.folder / name.replace(" ", "_"))
        path = machine.folder / f"{name.split()[0]}.yaml"
        path.write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "headgate.cli.main", "train", str(path)]
        if name == "killed":
            _kill_at_first_checkpoint(command, Path(content["output_dir"]))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr[-400:]}"
        (result,) = Path(content["output_dir"]).rglob("result.json")
        ends.append(json.loads(result.read_text())["train_loss"])
    difference = abs(ends[0] - ends[1])
    assert difference <= 1e-5 * abs(ends[0]), f"losses {ends}"
    return {"difference": difference}


def _kill_at_first_checkpoint(command: list[str], folder: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.rglob("checkpoint-*/trainer_state.json")):
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def checkpointed(method: str, machine: Machine) -> Figures:
    """Activation checkpointing changes memory, not losses."""
    difference = apart(machine.losses(method, model__activation_checkpointing=True), machine.losses(method))
    assert difference <= 1e-5, f"losses differ by {difference:.2g} of their size"
    return {"largest_relative_difference": difference}


def compiled(method: str, machine: Machine) -> Figures:
    """torch.compile of the model with the method in it: the same logits, and how many graph breaks."""
    case = machine.case(method)
    trainer = case.trainer({"model.device": machine.device, "model.dtype": "float32"}, alone=method == "lora")
    model: Any = trainer.model.eval()
    trainer.methods.eval()
    ids = torch.arange(3, 35, device=machine.device).view(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        backend = "inductor" if machine.device == "cuda" else "eager"
        ours = torch.compile(model, backend=backend)(**batch, use_cache=False).logits
    difference = float((ours - plain).abs().max())
    assert difference <= 1e-3, f"logits differ by {difference:.2g}"
    breaks = torch._dynamo.utils.counters["graph_break"]
    return {
        "largest_difference": difference,
        "graph_breaks": sum(breaks.values()),
        "reasons": list(breaks)[:5],
    }


def four_bit(machine: Machine) -> Figures:
    """LoRA on a 4-bit base: the loss falls."""
    machine.needs_cuda()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    found = machine.losses("lora", model="embedded", model__load_in_4bit=True, model__dtype="auto")
    assert found[-1] < found[0], f"losses {found}"
    return {"first_loss": found[0], "last_loss": found[-1]}


def liger(machine: Machine) -> Figures:
    """Liger's kernels under LoRA: the losses of transformers' own."""
    machine.needs_cuda()
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotHere("liger-kernel is not installed")
    plain = machine.losses("lora", training__loss="plain")
    # it patches transformers for the rest of this process, so this check goes last
    importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    difference = apart(machine.losses("lora", training__loss="plain"), plain)
    assert difference <= 1e-2, f"losses differ by {difference:.2g} of their size"
    return {"largest_relative_difference": difference}


def bench(name: str, machine: Machine) -> Figures:
    """``headgate bench``: what it measured; a missed target is a figure here, the bench's own exit code says it too."""
    machine.needs_cuda()
    file = machine.folder / "bench.json"
    command = [sys.executable, "-m", "headgate.cli.main", "bench", name, "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert file.exists(), done.stderr[-400:]
    report = json.loads(file.read_text())
    return {"ratios": report["ratios"], "missed": [c["name"] for c in report["checks"] if c["ok"] is False]}


def speed(method: str, machine: Machine) -> Figures:
    """Tokens a second and peak memory at a 1B shape in bf16; on a CPU at the test's shape."""
    large = machine.device == "cuda"
    model = "random:tinyllama-1.1b" if large else "random:llama"
    changes = {
        "model.device": machine.device, "model.dtype": "bfloat16" if large else "float32", "training.max_steps": STEPS,
        "training.per_device_train_batch_size": 8 if large else 2, "training.save_every": STEPS,
    }  # fmt: skip
    trained = machine.case(method, model).trained(changes, alone=method == "lora")
    rows = [row for row in trained.state.log_history if "tokens_per_second" in row]
    memory = torch.cuda.max_memory_allocated() if large else max(row["memory_peak"] for row in rows)
    return {"tokens_per_second": rows[-1]["tokens_per_second"], "memory_peak": memory}


CHECKS: dict[str, Callable[[Machine], Figures]] = {
    **{f"same:{method}": partial(same, method) for method in METHODS},
    **{f"bf16:{method}": partial(bf16, method) for method in METHODS},
    **{f"resume:{method}": partial(resumed, method) for method in METHODS},
    "kill": killed,
    "packing": partial(same, "lora", data__packing=True),
    **{f"checkpointing:{method}": partial(checkpointed, method) for method in METHODS},
    **{f"compile:{method}": partial(compiled, method) for method in METHODS},
    **{f"speed:{method}": partial(speed, method) for method in METHODS},
    **{f"bench:{name}": partial(bench, name) for name in BENCHES},
    "4bit": four_bit,
    "liger": liger,
}
