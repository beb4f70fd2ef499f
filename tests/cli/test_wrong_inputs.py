"""Wrong inputs of a new user: one line, an exit code, no traceback, nothing begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.wrong_inputs import WRONG, Wrong, last_line, prepare, said

PAGE = Path(__file__).resolve().parents[2] / "docs" / "wrong_inputs.md"


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.shown)
def test_a_wrong_input_is_told_in_a_line(wrong: Wrong, tmp_path, monkeypatch) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, text = said(wrong)
    assert code != 0, f"taken for right: {text}"
    assert "Traceback" not in text, text
    assert len(last_line(text)) > 20, text
    begun = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert not any(path.name in ("result.json", "checkpoint") for path in begun), begun


def test_the_page_has_a_line_for_each() -> None:
    """Written anew by ``python scripts/wrong_inputs.py``."""
    rows = PAGE.read_text().splitlines()
    for wrong in WRONG:
        assert sum(row.startswith(f"| `{wrong.shown}` | ") for row in rows) == 1, wrong.shown


def test_there_are_many() -> None:
    assert len(WRONG) >= 125 and len({wrong.shown for wrong in WRONG}) == len(WRONG)
