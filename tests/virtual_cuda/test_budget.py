"""How often a forward makes the host wait for a device: as often for many blocks as for few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.models.anatomy import describe
from headgate.models.block_parts import BlockParts
from headgate.models.load import load_model
from headgate.models.shapes import LLAMA_TINY
from headgate.testing.host_reads import HEADGATE
from headgate.testing.virtual_device import VirtualDevice
from tests.layer_routing.conftest import Forced, attach, batch_of
from tests.virtual_cuda import test_budget

WATCHED = [HEADGATE]

SETTINGS: dict[str, dict[str, Any]] = {
    "block": {},
    "attention and mlp": {"units": "attention_mlp"},
    "kv drop": {"kv": "drop"},
    "kv reuse": {"kv": "reuse"},
    "patch": {"patch": {"rank": 2}},
}


def waits(
    depth: int, folder: Path, *, routed: bool = True, decode: int = 0, grad: bool = True, **options: Any
) -> int:
    """Of one forward and backward, or of one prefill and ``decode`` steps, under gates that differ by token."""
    shape = folder / f"{depth}.json"
    shape.write_text(json.dumps({**LLAMA_TINY, "num_hidden_layers": depth}))
    model, _ = load_model(f"random:{shape}", lora={"dropout": 0.0}, device="cpu", attn_implementation="sdpa")
    model.eval()
    batch, method = batch_of(3, 12), attach(Forced(keep=1, **options), describe(model))
    assert isinstance(method, Forced)
    gates = method.config.gates_per_block * (depth - 1)
    drawn = torch.rand((3, 12 + decode, gates), generator=torch.Generator().manual_seed(3))
    method.gates = ((drawn < 0.5) * (1.0 if grad else 0.5)).requires_grad_(grad)
    method.set_routing("on" if routed else "removed")
    device = VirtualDevice(test_budget.WATCHED)
    device.put(model.state_dict(), method.state_dict(), method.gates, batch)
    with device.watching():
        if not decode:
            model(**batch, use_cache=False).logits.square().mean().backward()
        else:
            with torch.no_grad():
                out = model(**batch, use_cache=True)
                for _step in range(decode):
                    batch["attention_mask"] = torch.nn.functional.pad(
                        batch["attention_mask"], (0, 1), value=1
                    )
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(
                        input_ids=token,
                        attention_mask=batch["attention_mask"],
                        past_key_values=out.past_key_values,
                    )
    return sum(device.places.values())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("grad", [True, False])
def test_sparse_routing_waits_once_a_forward_whatever_the_depth(
    name: str, grad: bool, tmp_path: Path
) -> None:
    options = SETTINGS[name]
    bare = waits(4, tmp_path, routed=False, **options)
    few, many = (waits(depth, tmp_path, grad=grad, **options) for depth in (4, 9))
    assert few == many == bare + 1


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_waits_at_most_twice_a_step_whatever_the_depth(name: str, tmp_path: Path) -> None:
    options = SETTINGS[name]
    bare = waits(4, tmp_path, routed=False, decode=3, **options)
    few, many = (waits(depth, tmp_path, decode=3, **options) for depth in (4, 9))
    assert few == many <= bare + 2 * 4


def test_a_block_that_asks_the_device_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: every block reads a number of its own."""
    before = waits(4, tmp_path)
    original = BlockParts.mlp_branch
    monkeypatch.setattr(
        BlockParts, "mlp_branch", lambda self, x: original(self, x) * bool(x.sum().isfinite())
    )
    monkeypatch.setattr(test_budget, "WATCHED", [HEADGATE, Path(__file__).parent])
    assert waits(4, tmp_path) == before + 3
