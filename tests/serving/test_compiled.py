"""Compiled decoding: `generate` compiles the model around the questions that routing asks of the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig

from ..layer_routing.conftest import batch_of
from .conftest import exported, routed
from .test_generating import GREEDY, by_recomputing

KINDS: dict[str, dict[str, Any]] = {
    "document": {"granularity": "sample", "prefix_tokens": 4},
    "mask": {"policy": "static", "granularity": "auto", "skip": [2]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_decoding_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """A static cache, traced by torch.compile and run by its `eager` backend: the graphs are what is tested, not a compiler."""
    model, tokenizer, _ = routed(**KINDS[kind])
    folder = exported(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    batch = batch_of(left=True)
    wanted = by_recomputing(model, batch, 14)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling = CompileConfig(backend="eager", mode="default", fullgraph=False)
    compiling._compile_all_devices = True  # transformers compiles on accelerators alone, unless this is set
    found = again.generate(**batch, **GREEDY, cache_implementation="static", compile_config=compiling)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "something was compiled"
    assert torch.equal(found, wanted)
