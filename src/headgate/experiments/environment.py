"""Versions, hardware, revision and command line: what to paste into an issue, and what a run records."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from headgate.experiments.records import Environment
from headgate.experiments.redaction import command_line

PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pydantic",
    "lm_eval",
    "ray",
    "submitit",
    "bitsandbytes",
    "liger-kernel",
]


def environment() -> Environment:
    """Everything about this machine and installation that can change a result."""
    import psutil
    import torch

    import headgate
    from headgate.training import processes

    versions = {"headgate": headgate.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "hardware": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpus,
            "ranks": processes.world_size(),
        },
        "git_revision": _git_revision(),
        "command": command_line(sys.argv),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git_revision() -> str | None:
    """Revision of the working directory's repository, with ``+dirty`` where it has uncommitted changes."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        if run.returncode != 0:
            return None
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=30)
        return run.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None
