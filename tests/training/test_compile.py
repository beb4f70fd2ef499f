"""torch.compile: the base compiles with each method in it, in one process; how often its graph breaks is held to a number.

A break is where Python must look at a value (which blocks run, which expert is new). Elsewhere torch_compile is refused.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headgate.errors import ConfigError
from headgate.training import checks

SCRIPTS = Path(__file__).parents[2] / "scripts"
BREAKS = {"lora": 0, "schema_bank": 0, "layer_routing": 99, "lora_experts": 99, "backward_gate": 0}
"""Of one forward."""


@pytest.mark.slow
@pytest.mark.parametrize("method", BREAKS)
def test_graph_breaks(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the compiled model are those of the plain one (within 1e-3, which ``compiled`` asserts)."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    gpu_check_list: Any = importlib.import_module("gpu_check_list")
    figures = gpu_check_list.compiled(method, gpu_check_list.Machine("cpu", tmp_path))
    assert figures["graph_breaks"] <= BREAKS[method], figures


def test_a_sharded_base_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"a base sharded by model\.parallel is not offered"):
        checks.check_compile(SimpleNamespace(torch_compile=True), sharded=True)


def test_several_ranks_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="torch_compile on 2 ranks is not offered"):
        checks.check_compile(SimpleNamespace(torch_compile=True), sharded=False)
    checks.check_compile(SimpleNamespace(torch_compile=False), sharded=False)
