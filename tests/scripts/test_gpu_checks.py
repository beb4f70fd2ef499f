"""The checks of an accelerator run on the CPU that stands in for it, remember what is done, and fail where something fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_checks.py"


def checks(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ.copy(),
    )


def test_the_stand_in_passes_remembers_and_refuses_another_machine(tmp_path: Path) -> None:
    command = ("--device", "cpu", "--out", "gpu.json", "--only", "same:layer_routing", "packing", "4bit")
    done = checks(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {c["name"]: c["status"] for c in record["checks"]} == {
        "same:layer_routing": "passed", "packing": "passed", "4bit": "not here",
    }  # fmt: skip
    assert record["checks"][0]["figures"]["largest_relative_difference"] == 0.0
    again = checks(*command, cwd=tmp_path)
    assert again.returncode == 0 and not again.stdout, "what has passed ran again"
    record["machine"]["name"] = "another"
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    assert "give another --out" in checks(*command, cwd=tmp_path).stderr


def test_what_time_leaves_is_another_calls(tmp_path: Path) -> None:
    left = checks(
        "--device", "cpu", "--out", "gpu.json", "--only", "4bit", "liger", "--minutes", "-1", cwd=tmp_path
    )
    assert left.returncode == 3 and "2 checks are left: run again" in left.stdout


def test_a_check_that_fails_is_told_with_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The planted fault: a device whose losses drift."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check_list
    import gpu_checks

    drift = iter([[1.0, 2.0], [1.0, 2.1]])
    monkeypatch.setattr(gpu_check_list.Machine, "losses", lambda *_a, **_k: next(drift))
    entry = gpu_checks.run_check("same:lora", gpu_check_list.CHECKS["same:lora"], "cpu")
    assert entry["status"] == "failed" and "losses differ by 0.048" in entry["detail"]
    (tmp_path / "gpu.json").write_text(
        json.dumps({"machine": gpu_checks.machine_facts("cpu"), "checks": [entry]})
    )
    done = checks("--device", "cpu", "--out", "gpu.json", "--only", "liger", cwd=tmp_path)
    assert done.returncode == 1 and "failed: same:lora" in done.stdout


def test_a_wrong_call_is_refused_in_one_line(tmp_path: Path) -> None:
    calls: dict[tuple[str, ...], str] = {("--device", "cpu", "--only", "sme"): "no check begins so"}
    if not torch.cuda.is_available():
        calls[()] = "there is no CUDA device"
    for options, words in calls.items():
        done = checks(*options, "--out", "gpu.json", cwd=tmp_path)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
