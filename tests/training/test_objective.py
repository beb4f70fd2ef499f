"""The loss of a trainer that computes its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from headgate.training.objective import Objective


@pytest.mark.parametrize(
    ("items", "takes_items", "function", "loss"),
    [(None, True, None, 2.0), (8, False, None, 2.0), (8, True, None, 6.0), (None, False, print, 6.0)],
    ids=[
        "a mean of each",
        "a model that cannot divide",
        "divided by tokens already",
        "a function of the user's",
    ],
)
def test_a_loss_that_is_a_mean_is_divided_by_the_window(
    items: int | None, takes_items: bool, function: Any, loss: float
) -> None:
    """As transformers.Trainer.training_step does with ``gradient_accumulation_steps`` of 3."""
    trainer: Any = SimpleNamespace(
        methods=SimpleNamespace(columns=lambda: (), reading_hidden=()),
        anatomy=SimpleNamespace(head=nn.Identity()),
        compute_loss=lambda model, inputs, num_items_in_batch: torch.tensor([6.0]),
        compute_loss_func=function,
        model_accepts_loss_kwargs=takes_items,
    )
    step: Any = SimpleNamespace(batch={}, model=None, window_tokens=items, window_size=3)
    objective: Any = SimpleNamespace(_trainer=trainer)
    assert float(Objective._overridden(objective, step, "compute_loss").loss) == loss
