"""Small runs of every kind, in processes that are killed at a chosen file-system event; and what a run came to.

The processes are forked from a server that has imported everything once, so that a run takes a second and not ten.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from headgate.experiments.recipe_file import dump_recipe, recipe_from
from headgate.experiments.run import run
from headgate.experiments.run_directory import RunDirectory
from headgate.methods.backward_gate import BackwardGate
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.schema_bank import SchemaBank

PRELOADED = (BackwardGate, LayerRouting, LoraExperts, SchemaBank)

GATE = {"backward_gate": {"m": 32, "k": 4, "window": 8, "burn_in": 1, "target_acceptance": 0.5}}
ROUTING = {"layer_routing": {"policy": "gumbel", "granularity": "token", "keep": 1, "kd": False}}
BANK = {"schema_bank": {"num_schemas": 4, "rank": 2, "tags": "hash"}}
EXPERTS = {
    "lora_experts": {
        "experts": 2, "r": 2, "alpha": 4, "new_r": 2, "new_alpha": 4, "maturity_steps": 2, "target_modules": ["q_proj"],
        "spawn": {"policy": "always"},
    }
}  # fmt: skip
STREAM = [
    {
        "skill": skill, "source": "wordmath", "limit": 12, "steps": 3, "options": {"families": [skill]},
        "validation": {"source": "wordmath", "split": "validation", "limit": 4, "options": {"families": [skill]}},
    }
    for skill in ("shopping", "farm")
]  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "schema_bank": {"methods": BANK},
    "layer_routing": {"methods": ROUTING},
    "lora_experts": {"methods": EXPERTS, "lora": None},
    "births": {"methods": EXPERTS, "lora": None, "data.stream": STREAM, "training.max_steps": None},
    "backward_gate": {"methods": GATE},
    "half_filled_windows": {"methods": GATE, "training.gradient_accumulation_steps": 2},
    "packing": {"data.packing": True},
    "data_view": {"methods": {"backward_gate": {**GATE["backward_gate"], "memory": True}}},
    "early_stopping": {"training.early_stopping": {"patience": 1}, "training.learning_rate": 0.5},
    "bank+routing": {"methods": {**BANK, **ROUTING}},
    "bank+experts": {"methods": {**BANK, **EXPERTS}, "lora": None},
    "bank+gate": {"methods": {**BANK, **GATE}},
    "routing+experts": {"methods": {**ROUTING, **EXPERTS}, "lora": None},
    "routing+gate": {"methods": {**ROUTING, **GATE}},
    "experts+gate": {"methods": {**EXPERTS, **GATE}, "lora": None},
}


def recipe_of(kind: str, folder: Path) -> Path:
    """The recipe file of a small run of ``kind``, to be written below ``folder``."""
    content: dict[str, Any] = {
        "name": "fault",
        "output_dir": str(folder / "runs"),
        "model": {"name_or_path": "random:llama", "device": "cpu"},
        "lora": {"r": 2, "dropout": 0.1},
        "data": {
            "train": {"source": "wordmath", "limit": 24},
            "validation": {"source": "wordmath", "split": "validation", "limit": 6},
            "max_length": 256,
        },
        "training": {
            "max_steps": 6, "per_device_train_batch_size": 2, "save_every": 2, "eval_every": 3, "learning_rate": 1e-2,
        },
        "evaluation": [{"task": "perplexity", "source": "wordmath", "limit": 4, "lengths": [64]}],
        "logging_every": 1,
    }  # fmt: skip
    for dotted, value in KINDS[kind].items():
        *parents, last = dotted.split(".")
        node = content
        for part in parents:
            node = node[part]
        node[last] = value
    if "stream" in content["data"]:
        del content["data"]["train"], content["data"]["validation"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(recipe_from(content)))
    return path


_WRITING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod")


class Faults:
    """An audit hook that strikes at the n-th file-system event below a folder: kills the process, or fills the disk."""

    def __init__(self, below: str, at: int, fault: str) -> None:
        self.below, self.at, self.fault, self.count = below, at, fault, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode = arguments[0], arguments[1]
            writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
            if not (writes or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))):
                return
        elif event in _WRITING:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.below):
            return
        self.count += 1
        if self.count == self.at:
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _child(recipe: str, at: int, fault: str, after: float, report: str) -> None:
    """One run in this process; what it counted, or how it failed, is written to ``report``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    content = recipe_from(json.loads(Path(recipe).with_suffix(".json").read_text()))
    faults = Faults(content.output_dir, at, fault)
    sys.addaudithook(faults)
    if after:
        signal.setitimer(signal.ITIMER_REAL, after)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    try:
        run(content)
    except Exception as error:
        Path(report).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        os._exit(3)
    Path(report).write_text(json.dumps({"events": faults.count}))


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.runs"])
    return context


def attempt(recipe: Path, *, at: int = 0, fault: str = "kill", after: float = 0.0) -> dict[str, Any]:
    """One process over the run: ``exit`` (negative: the signal), and its ``events`` or ``error``."""
    import yaml

    recipe.with_suffix(".json").write_text(json.dumps(yaml.safe_load(recipe.read_text())))
    report = recipe.parent / "report.json"
    report.unlink(missing_ok=True)
    process = _context().Process(target=_child, args=(str(recipe), at, fault, after, str(report)))
    process.start()
    process.join(240)
    assert process.exitcode is not None, "the run hangs"
    return {"exit": process.exitcode, **(json.loads(report.read_text()) if report.exists() else {})}


TIMES = (
    "seconds",
    "tokens_per_second",
    "memory_peak",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)


def _timeless(content: Any) -> Any:
    """``content`` without what two executions of the same run may differ in: time and memory."""
    if isinstance(content, dict):
        return {
            key: _timeless(value)
            for key, value in content.items()
            if not key.endswith((*TIMES, "milliseconds", "runtime", "per_second", "_ms"))
            and key not in ("hardware", "versions")
        }
    return [_timeless(item) for item in content] if isinstance(content, list) else content


def directory_of(recipe: Path) -> RunDirectory:
    import yaml

    return RunDirectory.of(recipe_from(yaml.safe_load(recipe.read_text())))


def outcome(recipe: Path) -> dict[str, Any]:
    """All that a run leaves: weights and predictions by digest, result and metrics but for times, the names of its files."""
    directory = directory_of(recipe)
    tensors = {}
    for file in sorted(directory.checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            tensors[f"{file.name}:{name}"] = hashlib.sha256(data).hexdigest()
    return {
        "status": directory.status,
        "tensors": tensors,
        "result": _timeless(directory.result()) if directory.status == "complete" else None,
        "metrics": [_timeless(row) for row in directory.metrics()],
        "predictions": {f.name: f.read_text() for f in sorted(directory.predictions.glob("*"))},
        "files": sorted(str(p.relative_to(directory.path)) for p in directory.path.rglob("*") if p.is_file()),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two outcomes differ, in words."""
    found = [f"{key}: {one[key]} | {other[key]}" for key in ("status", "files") if one[key] != other[key]]
    found += [
        f"tensor {n}"
        for n in {**one["tensors"], **other["tensors"]}
        if one["tensors"].get(n) != other["tensors"].get(n)
    ]
    for place, (a, b) in enumerate(zip(one["metrics"], other["metrics"], strict=False)):
        if a != b:
            found.append(
                f"metrics row {place}: "
                + str({k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)})
            )
    if len(one["metrics"]) != len(other["metrics"]):
        found.append(f"{len(one['metrics'])} metrics rows | {len(other['metrics'])}")
    if one["result"] != other["result"]:
        found.append(f"result: {json.dumps(one['result'])[:2000]} | {json.dumps(other['result'])[:2000]}")
    return found + [n for n in one["predictions"] if one["predictions"][n] != other["predictions"].get(n)]
