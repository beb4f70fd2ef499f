"""A method of another package has its section in the page, beside Headgate's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headgate.errors import ConfigError
from headgate.experiments.inspection import INSPECTORS
from headgate.experiments.report.content import Text
from headgate.experiments.report.page import build
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.sections import SECTIONS, figures_of
from headgate.experiments.report.sections.layer_routing import seed_figures

from .conftest import make_comparison


def test_a_registered_section_is_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SECTIONS, "_builtin", {k: v for k, v in SECTIONS._builtin.items() if k != "schema_bank"}
    )
    study = read_study(make_comparison(tmp_path, [1, 2, 3]))
    assert "schema_bank" in study.methods
    assert "schema_bank" not in {section.key for section in build(study)}
    monkeypatch.setitem(SECTIONS._registered, "schema_bank", lambda study: [Text("by somebody else")])
    (mine,) = [section for section in build(study) if section.key == "schema_bank"]
    assert mine.blocks == [Text("by somebody else")]


def test_every_name_offered_can_be_had() -> None:
    for registry in (SECTIONS, INSPECTORS):
        things: list[Any] = [registry.get(name) for name in registry.names()]
        assert things and all(map(callable, things))
    assert figures_of("layer_routing") is seed_figures
    with pytest.raises(ConfigError, match=r"unknown report section 'ewc'.*headgate\.report_sections"):
        figures_of("ewc")
