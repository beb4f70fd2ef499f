"""A compiled base trains what the plain one trains, with every method; ``torch_compile`` of the whole is refused by name.

Graph breaks and frames that are given up are counted: between the parts a method may decide what it likes; inside them only
``lora_experts`` decides something (how many tokens each expert gets), and parts with its linears run as they are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from headgate.errors import ConfigError
from headgate.experiments.recipe_file import load_recipe
from headgate.experiments.run import run
from headgate.models.anatomy import describe
from headgate.models.compiled import compile_parts
from headgate.models.load import load_model
from headgate.training import checks
from tests.faults.runs import recipe_of

COMPILED, PLAIN = SimpleNamespace(torch_compile=True), SimpleNamespace(torch_compile=False)


@pytest.mark.parametrize(
    ("kind", "unbroken"),
    [
        ("lora", True),
        ("schema_bank", True),
        ("layer_routing", True),
        ("backward_gate", True),
        ("lora_experts", False),
    ],
)
def test_compiled_parts_change_nothing(kind: str, unbroken: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    losses = []
    for name, changes in (("plain", ()), ("compiled", ("model.compile=eager",))):
        made = run(load_recipe(recipe_of(kind, tmp_path / name), changes))
        losses.append([row["loss"] for row in made.metrics() if "loss" in row])
        assert made.result()["verification"]["verified"]
        graphs = counters["stats"]["unique_graphs"]
        assert (graphs > 0) == (name == "compiled")
    assert losses[0] and losses[1] == pytest.approx(losses[0], abs=1e-5)
    frames = counters["frames"]
    assert not counters["graph_break"]
    assert (frames["total"] == frames["ok"]) == unbroken, frames


def test_equal_blocks_share_their_graphs() -> None:
    """Eight blocks take as many graphs as two would: a deep model is not compiled block by block."""
    torch._dynamo.reset()
    counters.clear()
    model, _ = load_model("embedded", lora={"r": 2}, compile="eager")
    plain, _ = load_model("embedded", lora={"r": 2})
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits = [m(ids, use_cache=False).logits for m in (model, plain)]
    assert torch.allclose(*logits, atol=1e-5)
    generated = [m.generate(ids, max_new_tokens=3, do_sample=False).tolist() for m in (model, plain)]
    assert generated[0] == generated[1]
    assert counters["stats"]["unique_graphs"] < 4, "8 blocks of two parts"
    assert list(model.state_dict()) == list(plain.state_dict()), "names are those of the plain model"


def test_a_copy_runs_on_its_own_weights() -> None:
    model, _ = load_model("embedded", lora={"r": 2}, compile="eager")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        copied = copy.deepcopy(model)
        for name, parameter in copied.named_parameters():
            if "mlp" in name or "self_attn" in name:
                parameter.zero_()
        assert not torch.allclose(copied(ids, use_cache=False).logits, before, atol=1e-3)
        assert torch.equal(model(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("shape", ["gpt2", "gemma3", "qwen2"])
def test_other_families_compile_and_decode(shape: str) -> None:
    """Attention of other families takes its cache by another name or place, and masks of its own."""
    model, _ = load_model(f"random:{shape}", compile="eager", seed=3)
    plain, _ = load_model(f"random:{shape}", seed=3)
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    with torch.no_grad():
        logits = [m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (model, plain)]
    assert torch.allclose(*logits, atol=1e-5)
    texts = [m.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*texts)


def test_a_forward_that_something_else_replaced_is_refused() -> None:
    model, _ = load_model("embedded", lora={"r": 2})
    part = describe(model).mlp(describe(model).blocks[0])
    part.forward = part.forward
    with pytest.raises(ConfigError, match=r"model\.compile: .*MLP runs by a forward"):
        compile_parts(model, "eager")


def test_compiling_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"model\.compile: inductor needs a C\+\+ compiler .* no 'no-such-compiler'"
    ):
        load_model("embedded", lora={"r": 2}, compile="inductor")


def test_a_sharded_base_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"compile: inductor: FSDP2"):
        load_model("embedded", lora={"r": 2}, compile="inductor", parallel={"fsdp": 2})


@pytest.mark.parametrize(
    ("methods", "sharded", "ranks", "said"),
    [
        (["schema_bank", "layer_routing"], False, 1, r"schema_bank, layer_routing is not offered.*set model\.compile"),
        ([], True, 2, r"torch_compile with a base sharded by model\.parallel is not offered: leave torch_compile out$"),
        ([], False, 2, r"torch_compile with 2 ranks is not.*set model\.compile"),
    ],
)  # fmt: skip
def test_where_compiling_the_whole_is_refused(
    methods: list[str], sharded: bool, ranks: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "world_size", lambda: ranks)
    with pytest.raises(ConfigError, match=said):
        checks.check_compile(COMPILED, methods, sharded)
    checks.check_compile(PLAIN, methods, sharded)


def test_an_adapter_alone_in_one_process_may_be_compiled() -> None:
    checks.check_compile(COMPILED, [], sharded=False)
