"""The gallery has every comparison that is kept, and says of each what its table says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def gallery() -> Any:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "scripts" / "gallery.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kept_comparison_is_listed_once() -> None:
    module = gallery()
    files = sorted(module.RESULTS.glob(f"*{module.ENDING}"))
    tables = {file.name.removesuffix(module.ENDING): json.loads(file.read_text()) for file in files}
    text = module.index(tables)
    assert len(files) >= 20
    for name in tables:
        assert text.count(f"]({name}.html)") == 1, name


def test_a_page_is_drawn_once_and_again_when_its_table_changes(tmp_path: Path, monkeypatch: Any) -> None:
    module = gallery()
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    file = tmp_path / "layer_routing_50.comparison.json"
    file.write_bytes((module.RESULTS / file.name).read_bytes())
    page = module.drawn(file)
    assert "Against random" in page and "<script" not in page and "http-equiv" not in page
    assert module.drawn(file) == page and len(list(module.CACHE.iterdir())) == 1
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "name": "another-name"}))
    assert "another-name" in module.drawn(file) and len(list(module.CACHE.iterdir())) == 2
