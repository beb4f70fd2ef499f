"""The first forward that a router may read: what it is, what it leaves, what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headgate.errors import ConfigError, ModelError
from headgate.methods.layer_routing import LayerRouting
from headgate.models.surgery import on_input

from .conftest import attach, batch_of, model_of
from .test_training import logs_of, method_of, trainer_of


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_router_reads_the_plain_models_last_hidden_state(family: str) -> None:
    """With adapter and gates on, in training mode too: what it reads is the base model's, bitwise."""
    model, _, anatomy = model_of(family)
    batch = batch_of(padded=False)
    with torch.no_grad(), model.disable_adapter():
        expected = anatomy.backbone(**batch).last_hidden_state
    read: list[torch.Tensor] = []
    method = attach(LayerRouting(keep=1, features="prepass", granularity="token", init_keep=0.5), anatomy)
    assert method.router is not None
    on_input(method.router, read.append)
    for training in (False, True):
        model.train(training)
        modes = [module.training for module in model.modules()]
        model(**batch)
        assert torch.equal(read.pop(), expected) and not expected.requires_grad
        assert [module.training for module in model.modules()] == modes
    method.detach()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_cache_that_the_first_forward_has_not_seen_is_refused() -> None:
    model, _, anatomy = model_of()
    method = attach(LayerRouting(keep=1, features="prepass"), anatomy)
    ids = batch_of(2, 8, padded=False)["input_ids"]
    method.set_routing("removed")
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    method.set_routing("on")
    with pytest.raises(ModelError, match="has seen 0 of the 4 tokens"):
        model(input_ids=ids[:, 4:5], past_key_values=cache, use_cache=True)
    with pytest.raises(ConfigError, match=r"features: prepass.*'random' has none"):
        LayerRouting(policy="random", features="prepass")


def test_it_costs_one_forward(tmp_path: Path) -> None:
    """In the accounts: the same run with and without it differs by one full forward a step."""
    flops, options = {}, {"kd": False, "granularity": "token"}
    for features in ("block", "prepass"):
        trainer = trainer_of(tmp_path / features, {**options, "features": features}, max_steps=2)
        trainer.train()
        flops[features] = float(trainer.flops)
        executed = {row["routing/executed"] for row in logs_of(trainer)}
        assert executed == {1.0 + (features == "prepass")}
        assert method_of(trainer).shares.first_forward == (features == "prepass")
    trainable = sum(p.numel() for p in trainer.named_trainable.values())
    forwards = (flops["block"] - 2.0 * float(trainer.trained_tokens) * trainable) / 2
    assert flops["prepass"] - flops["block"] == pytest.approx(forwards, rel=0.1)
