"""A small random model and its tokenizer, made once."""

from __future__ import annotations

from typing import Any

import pytest

from headgate.models.load import load_model


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    return load_model("random:llama", device="cpu", seed=3)
