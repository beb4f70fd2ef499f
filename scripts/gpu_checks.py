"""Everything that an accelerator must show, in pieces of minutes: one JSON of checks, resumed where it stopped.

    python scripts/gpu_checks.py --out benchmarks/results/gpu.json          # on a GPU; run again until it says that all are done
    python scripts/gpu_checks.py --device cpu --only quick                  # the stand-in: the same checks on a CPU, small
    python scripts/gpu_checks.py --list | --wheels

Nothing is downloaded: models are ``random:`` shapes and the embedded one, data is made. A check that has passed, or that this
machine cannot run, is not run again; ``--again`` runs it. Exit code 1 if one failed, 3 if some are left to do.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_check_list import CHECKS, Machine, NotHere

from headgate.files import write_atomically

WHEELS = (
    "headgate (python -m pip wheel --no-deps .)", "pydantic", "pydantic-core", "typing-inspection", "annotated-types", "datasets",
    "dill", "multiprocess", "liger-kernel (optional)", "bitsandbytes (optional, 60 MB: a carry of its own)",
)  # fmt: skip
"""What a machine with torch 2.11, transformers, peft and accelerate lacks to run this."""
MINUTES = 9.0
"""No check is begun after this long: the rest is another call's."""


def load(path: Path) -> dict[str, Any]:
    """The record so far, or a new one."""
    if not path.exists():
        return {"machine": {}, "checks": []}
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def machine_facts(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": device, "name": name, "torch": torch.__version__, "python": platform.python_version()}


def run_check(name: str, check: Callable[[Machine], Mapping[str, Any]], device: str) -> dict[str, Any]:
    """One entry of the record: ``passed``, ``failed`` or ``not here``, with its figures or the reason."""
    begun = time.perf_counter()
    entry: dict[str, Any] = {"name": name, "status": "passed", "figures": {}, "detail": ""}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            entry["figures"] = dict(check(Machine(device, Path(folder))))
        except NotHere as reason:
            entry |= {"status": "not here", "detail": str(reason)}
        except AssertionError as error:
            entry |= {"status": "failed", "detail": str(error)[:600]}
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            entry |= {"status": "failed", "detail": f"{type(error).__name__}: {error} ({where})"[:600]}
    if device == "cuda":
        entry["peak_bytes"] = torch.cuda.max_memory_allocated()
    return {**entry, "seconds": round(time.perf_counter() - begun, 2)}


def chosen(only: list[str]) -> list[str]:
    """Names that begin with one of ``only``; ``quick`` is the stand-in's choice. SystemExit for a prefix of none."""
    if not only:
        return list(CHECKS)
    prefixes = [p for one in only for p in (QUICK if one == "quick" else (one,))]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in CHECKS):
            raise SystemExit(f"--only {prefix}: no check begins so; --list names them")
    return [name for name in CHECKS if any(name.startswith(prefix) for prefix in prefixes)]


QUICK = (
    "same:lora",
    "same:layer_routing",
    "resume:lora",
    "checkpointing:layer_routing",
    "packing",
    "4bit",
    "liger",
)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names, or `quick`")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--again", action="store_true", help="run what has passed too")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--wheels", action="store_true")
    options = parser.parse_args()
    if options.list or options.wheels:
        print("\n".join(WHEELS if options.wheels else CHECKS))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: use --device cpu for the stand-in")
    missing = [
        name
        for name in ("transformers", "peft", "datasets", "pydantic")
        if not importlib.util.find_spec(name)
    ]
    if missing:
        raise SystemExit(f"{', '.join(missing)} is not installed: --wheels lists what to carry")
    record, facts = load(options.out), machine_facts(options.device)
    if record["machine"] and record["machine"] != facts:
        raise SystemExit(f"{options.out} holds {record['machine']}, this is {facts}: give another --out")
    record["machine"] = facts  # figures of two machines do not mix
    begun, left = time.monotonic(), 0
    for name in chosen(options.only):
        done = next((entry for entry in record["checks"] if entry["name"] == name), None)
        if done is not None and done["status"] != "failed" and not options.again:
            continue
        if time.monotonic() - begun > options.minutes * 60:
            left += 1
            continue
        entry = run_check(name, CHECKS[name], options.device)
        record["checks"] = [*(e for e in record["checks"] if e["name"] != name), entry]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(record, indent=1))
        print(
            f"{entry['status']:9} {name} {entry['seconds']}s {entry['figures'] or entry['detail']}",
            flush=True,
        )
    failed = [entry["name"] for entry in record["checks"] if entry["status"] == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}")
    if left:
        print(f"{left} checks are left: run again")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
