"""The notebooks of ``examples/`` run from their first cell to their last, in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import headgate as hg

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_there_are_some() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.loads(path.read_text())
    assert content["nbformat"] == 4
    namespace: dict[str, object] = {}
    for number, cell in enumerate(content["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are of the machine that wrote them: clear them"
            exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), namespace)
    comparison = namespace["comparison"]
    assert isinstance(comparison, hg.ComparisonResult) and comparison.frame()["verified"].all()
    assert (comparison.folder / "report" / "index.html").exists()
