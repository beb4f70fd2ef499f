"""A router is held against the line between two masks at what it executes, not at what it opens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def comparison(**arms: list[tuple[float, float]]) -> dict[str, Any]:
    """Arms of (executed share, loss) by seed."""
    return {
        "arms": {
            name: {
                "values": [loss for _, loss in runs],
                "metrics": [{"perplexity": {"loss": loss, "executed_share": share}} for share, loss in runs],
            }
            for name, runs in arms.items()
        }
    }


def asked(folder: Path, table: dict[str, Any], *arms: str) -> subprocess.CompletedProcess[str]:
    file = folder / "comparison.json"
    file.write_text(json.dumps(table))
    command = [sys.executable, str(ROOT / "scripts/equal_flops.py"), str(file), *arms]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_margin_is_the_distance_from_the_line(tmp_path: Path) -> None:
    """Half-way between masks of .5 and .6 the line is at the mean of their losses, a quarter on a quarter down, at .6 the second's."""
    half, six = [(0.5, 0.8), (0.5, 0.9), (0.5, 0.7)], [(0.6, 0.4), (0.6, 0.5), (0.6, 0.6)]
    table = comparison(router=[(0.55, 0.5), (0.525, 0.75), (0.6, 0.4)], half=half, six=six)
    done = asked(tmp_path, table, "router", "half", "six")
    assert done.returncode == 0, done.stderr
    assert "router executes 0.558 of full depth" in done.stdout
    assert done.stdout.strip().endswith("3 seeds: -0.100, -0.050, -0.200")


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (("far", "half", "six"), "the router executes 0.700 of full depth, the masks 0.500 and 0.600"),
        (("router", "half", "seven"), "there is no arm 'seven': choose from router, half, six, far"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, arms: tuple[str, ...], said: str) -> None:
    points = {"router": 0.55, "half": 0.5, "six": 0.6, "far": 0.7}
    table = comparison(**{name: [(share, 0.5), (share, 0.6), (share, 0.8)] for name, share in points.items()})
    done = asked(tmp_path, table, *arms)
    assert done.returncode == 1 and said in done.stderr
