"""torch_compile is refused by name wherever nothing has shown that a compiled graph does what the plain one does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headgate.errors import ConfigError
from headgate.training import checks

COMPILED, PLAIN = SimpleNamespace(torch_compile=True), SimpleNamespace(torch_compile=False)


@pytest.mark.parametrize(
    ("methods", "sharded", "ranks", "said"),
    [
        (["schema_bank", "layer_routing"], False, 1, "torch_compile with schema_bank, layer_routing is not"),
        ([], True, 2, r"torch_compile with a base sharded by model\.parallel is not"),
        ([], False, 2, "torch_compile with 2 ranks is not"),
    ],
)
def test_where_compiling_is_refused(
    methods: list[str], sharded: bool, ranks: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "world_size", lambda: ranks)
    with pytest.raises(ConfigError, match=said):
        checks.check_compile(COMPILED, methods, sharded)
    checks.check_compile(PLAIN, methods, sharded)


def test_an_adapter_alone_in_one_process_may_be_compiled() -> None:
    checks.check_compile(COMPILED, [], sharded=False)
