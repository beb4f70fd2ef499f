"""The command as a new user types it: compare ends in a page; report, figures, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import here, recipe

ROUTED = {"policy": "gumbel", "granularity": "token", "kd": False}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    compare = {"seeds": [1], "arms": {"lora": {}, "routed": {"methods": {"layer_routing": ROUTED}}}}
    done = here("compare", recipe(folder, compare=compare, training__max_steps=4))
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("report: ")]
    page = Path(told.removeprefix("report: "))
    assert page.name == "index.html" and "No verdict: 1 seed carries no interval" in page.read_text()
    return page.parents[1]


def test_what_inspect_finds_is_on_the_next_page(comparison: Path) -> None:
    """Depth by token category and token by token, of a real router on held-out text."""
    runs = json.loads((comparison / "comparison.json").read_text())["arms"]["routed"]["runs"]
    run = Path(runs["1"])
    assert "run <code>headgate inspect</code>" in (comparison / "report" / "index.html").read_text()
    done = here("inspect", run, "--limit", 8)
    assert done.returncode == 0 and "token category" in done.stdout, done.stderr
    found = json.loads((run / "inspect" / "layer_routing.json").read_text())
    whole = sum(entry["depth"] * entry["tokens"] for entry in found["categories"].values())
    assert whole / found["tokens"] == pytest.approx(found["utilization"], abs=1e-5)
    assert all(0 <= depth <= 1 for text in found["texts"] for depth in text["depth"])
    assert here("report", comparison).returncode == 0
    assert "Which tokens get depth" in (comparison / "report" / "index.html").read_text()


def test_one_run_and_one_method(comparison: Path) -> None:
    runs = json.loads((comparison / "comparison.json").read_text())["arms"]
    done = here("report", runs["lora"]["runs"]["1"])
    assert done.returncode == 0 and "report.md" in done.stdout and "arms.csv" in done.stdout
    done = here("report", comparison, "--figures", "layer_routing")
    assert done.returncode == 0 and "routing_convergence.png" in done.stdout
    done = here("report", runs["lora"]["runs"]["1"], "--figures", "layer_routing")
    assert done.returncode == 2 and "used layer_routing (found: no method): nothing to draw" in done.stderr


def test_mistakes_name_their_cure(comparison: Path, tmp_path: Path) -> None:
    for arguments, code, told in (
        ([tmp_path / "absent"], 1, "is no folder: name a comparison, a run directory, or a folder of runs"),
        ([tmp_path], 1, "holds no comparison and no run"),
        (
            [comparison, "--figures", "routing"],
            2,
            "unknown report section 'routing': did you mean 'layer_routing'?",
        ),
    ):
        done = here("report", *arguments)
        assert done.returncode == code and told in done.stderr, done.stderr
