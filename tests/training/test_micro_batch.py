"""What is counted of a micro-batch, and what is logged of a step, each by itself."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from headgate.methods.costs import StepCost
from headgate.training import counted, micro_batch
from headgate.training.micro_batch import MicroBatch
from headgate.training.mixin import MethodsMixin
from headgate.training.telemetry import Telemetry


def of(accepted: list[bool], recomputes: bool, monkeypatch: Any) -> list[tuple[float, int]]:
    """(share of the blocks, passes through the head) of a micro-batch with these decisions, as they enter the account."""
    step: Any = SimpleNamespace(phase="batch", accepted=True)
    methods = SimpleNamespace(on_step_start=lambda step: None)
    running = MicroBatch(SimpleNamespace(methods=methods, anatomy=None), step)
    decisions, counted = iter(accepted), []
    for name, act in (
        ("_decide", lambda: next(decisions)),
        ("_forward", lambda: SimpleNamespace(recomputes=recomputes)),
        ("_show", lambda task: None),
        ("_backward", lambda task: None),
        ("_count", lambda reached, heads: counted.append((reached, heads))),
    ):
        monkeypatch.setattr(running, name, act)
    monkeypatch.setattr(micro_batch, "reached_share", lambda *_: 0.0)
    running.run()
    return counted


@pytest.mark.parametrize(
    ("accepted", "recomputes", "counted"),
    [
        ([False], True, (0.0, 0)),
        ([True, False], True, (1.0, 1)),
        ([True, True], False, (1.0, 1)),
        ([True, True], True, (1.0, 2)),
    ],
    ids=["before the forward", "after it", "trained", "trained, logits made again"],
)
def test_a_forward_is_counted_once_and_the_head_once_more_where_a_backward_repeats_it(
    accepted: list[bool], recomputes: bool, counted: tuple[float, int], monkeypatch: Any
) -> None:
    assert of(accepted, recomputes, monkeypatch) == [counted]


def test_accounts_and_logs_add_up_over_micro_batches(monkeypatch: Any) -> None:
    """The loss of all, where one was computed; tokens of the accepted; FLOPs of each."""
    monkeypatch.setattr(micro_batch, "executed_flops", lambda *_: 5.0)
    run, telemetry = SimpleNamespace(flops=0.0, trained_tokens=0), Telemetry()
    trainer = SimpleNamespace(
        run_state=run,
        telemetry=telemetry,
        window=SimpleNamespace(count=lambda step: None),
        methods=None,
        anatomy=None,
        stages=None,
    )
    valid = torch.tensor([[True, True, True, False]])
    for accepted, loss in ((True, torch.tensor(2.0)), (False, torch.tensor(4.0)), (False, None)):
        step: Any = SimpleNamespace(accepted=accepted, task_loss=loss, num_tokens=3, valid=valid)
        MicroBatch(trainer, step)._count(1.0, 1)
    assert (run.flops, run.trained_tokens) == (15.0, 3)
    assert telemetry.flush() == {"loss_all": 3.0, "padding_fraction": 0.25}


def test_blocks_are_charged_by_the_share_that_was_reached_and_ran(monkeypatch: Any) -> None:
    """In forwards: half of the blocks reached, half of those run, and one whole forward besides."""
    monkeypatch.setattr(counted, "forward_flops", lambda anatomy, tokens, pairs, share=1.0, heads=1.0: share)
    valid = torch.ones(1, 4, dtype=torch.bool)
    step: Any = SimpleNamespace(valid=valid, segment_ids=None, accepted=False)
    methods: Any = SimpleNamespace(cost=lambda step: StepCost(share=0.5, forwards=1.0))
    assert counted.executed_flops(step, methods, None, None, 0.5, 1) == 1.25  # type: ignore[arg-type]
    assert counted.executed_flops(step, methods, None, None, 0.0, 0) == 0  # type: ignore[arg-type]


def test_the_norm_that_is_logged_is_the_one_before_clipping() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(max_grad_norm=0.5),
        accelerator=SimpleNamespace(clip_grad_norm_=clip_grad_norm_),
        methods=nn.Module(),
    )
    trainer._clipped = partial(MethodsMixin._clipped, trainer)
    assert float(MethodsMixin._clip_grad_norm(trainer, model)) == 5.0
    assert float(model.weight.grad.norm()) == pytest.approx(0.5)
