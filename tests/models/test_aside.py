"""Looking aside leaves a model as it was; one filter of inputs, one count of a block, one row per architecture."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import headgate
import headgate.models
from headgate.errors import ConfigError, ModelError
from headgate.models import Family, register_family
from headgate.models.anatomy import describe, model_inputs
from headgate.models.aside import look_aside
from headgate.models.families import FAMILIES
from headgate.models.flops import BlockFlops
from headgate.models.shapes import SHAPES

ROOT = Path(headgate.__file__).parent
IDS = torch.arange(12).reshape(2, 6)


def tiny(kind: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPES[kind], **changes}))


def adapted() -> Any:
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.train()


def test_every_module_gets_its_own_mode_back_also_after_an_error() -> None:
    model = adapted()
    still = model.get_base_model().model.layers[1]
    still.eval()  # somebody keeps one block in evaluation mode
    before = [module.training for module in model.modules()]
    with look_aside(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="stop"), look_aside(model, adapters=False):
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


def test_without_adapters_it_is_the_base_and_nothing_trains_more_than_before() -> None:
    model, plain = adapted(), tiny().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)  # a stage that trains a part of the adapter
    trains = [p.requires_grad for p in model.parameters()]
    with look_aside(model, adapters=False):
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with look_aside(model):
        assert not torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert [p.requires_grad for p in model.parameters()] == trains
    with look_aside(plain, adapters=False):  # a model without any is its own base
        plain(input_ids=IDS)


def test_what_methods_add_never_reaches_the_model() -> None:
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": None, "tags": [[1]], "segment_ids": IDS}
    assert set(model_inputs(batch)) == {"input_ids", "labels"}
    assert set(model_inputs(batch, labels=False)) == {"input_ids"}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_block_is_counted_as_torch_counts_it(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    anatomy = describe(tiny(kind))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        anatomy.model(input_ids=IDS, use_cache=False)
    linears = [
        flops
        for name, flops in counter.get_flop_counts()["Global"].items()
        if str(name) in ("aten.mm", "aten.addmm")
    ]
    head = 2 * IDS.numel() * anatomy.hidden_size * anatomy.vocab_size
    assert sum(linears) - head == pytest.approx(
        IDS.numel() * anatomy.num_blocks * BlockFlops.of(anatomy).block
    )


def test_an_architecture_is_described_once() -> None:
    with pytest.raises(ModelError, match=r"headgate\.models\.register_family"):
        describe(renamed("unheard_of"))
    assert headgate.models.register_family is register_family
    try:
        register_family("unheard_of", Family())
        assert describe(renamed("unheard_of")).num_blocks == 4
        register_family("unheard_of", Family())  # the same again: a notebook cell run twice
        with pytest.raises(ConfigError, match="'unheard_of' is described already"):
            register_family("unheard_of", Family(blocks="h"))
    finally:
        FAMILIES.pop("unheard_of", None)


def renamed(kind: str) -> Any:
    model = tiny()
    model.config = type("Other", (type(model.config),), {"model_type": kind})(
        **{k: v for k, v in SHAPES["llama"].items() if k != "model_type"}
    )
    return model


def test_looking_aside_is_written_once() -> None:
    """``model.train(was_training)`` would put every module into one mode: only ``models.aside`` restores modes."""
    found = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "train"
            ) and any(isinstance(a, ast.Name) and "training" in a.id for a in node.args):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, found
