"""Where routing does not beat the best mask of its depth on validation data, the mask is served, and the result says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.errors import ConfigError
from headgate.methods.layer_routing import LayerRouting
from headgate.training.saved import load

from .conftest import batch_of
from .test_held_out import evaluated
from .test_training import make_rows, method_of, trainer_of

TOKEN: dict[str, Any] = {"granularity": "token", "target_utilization": 0.75, "fallback": "mask", "kd": False}


def test_the_better_of_both_is_served(tmp_path: Path) -> None:
    """The choice follows the two losses, both ways; figures, inference and a loaded copy agree with it."""
    trainer = trainer_of(tmp_path, TOKEN, max_steps=4, seed=1)  # the seed that the base is drawn from
    trainer.train()
    trainer.eval_dataset = make_rows()
    trainer.evaluate()
    batches = list(trainer.get_eval_dataloader())
    method, model = method_of(trainer), trainer.model.eval()
    assert method.fallback is not None
    figures = method.summary()
    fixed, router = method.execution.loss(batches, method.fallback.mask), figures["routing_loss_router"]
    assert figures["routing_loss_mask"] == pytest.approx(fixed, rel=1e-5)
    assert figures["routing_in_use"] == ("mask" if fixed <= router else "router")
    mask = torch.tensor([1.0, 0.0, 1.0])
    for losses, served in (((1.0, 2.0), "router"), ((2.0, 1.0), "mask"), ((1.0, 1.0), "mask")):
        method.fallback.choose(mask, lambda mask, pair=losses: pair[mask is not None])
        assert method.summary()["routing_in_use"] == served
        with torch.no_grad():
            model(**batch_of())
        assert method.route is not None and (method.route.logits is None) == (served == "mask")
    assert method.summary()["routing_mask_skips"] == [2]
    trainer.base_model = {"name_or_path": "random:llama"}
    trainer.save_model(str(tmp_path / "saved"))
    again, _ = load(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            again(**batch_of()).logits, model(**batch_of()).logits, atol=1e-5, rtol=1e-5
        )
        (copy,) = again.headgate_methods
        assert copy.route.weight.flatten().tolist() == [1.0, 0.0, 1.0]
        options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
        made = (owner.generate(**batch_of(2, 8), **options) for owner in (again, model))
        assert torch.equal(*made)


def test_training_goes_on_with_the_router(tmp_path: Path) -> None:
    """A served mask is a matter of inference: gates in training are the router's, and it may win a later validation."""
    trainer, _ = evaluated(tmp_path, **TOKEN)
    method = method_of(trainer)
    assert method.fallback is not None
    method.fallback.active.fill_(True)
    trainer.model.train()
    trainer.model(**batch_of())
    assert method.route is not None and method.route.logits is not None


def test_it_needs_a_depth_to_compare_at() -> None:
    for options in ({"budget": "none"}, {"policy": "static"}):
        with pytest.raises(ConfigError, match="fallback: mask compares"):
            LayerRouting(fallback="mask", **options)
