"""A decoding step pays for what it runs: a route that a document keeps is decided once, and then costs no operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from headgate.experiments.served import load_written
from headgate.methods.layer_routing.opened import HostGates

from ..layer_routing.conftest import batch_of
from .conftest import exported, routed
from .test_generating import GREEDY, by_recomputing


class Operations(TorchDispatchMode):
    """How many torch operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def asked(router: nn.Module) -> list[int]:
    """Receives the number of rows of every call of a router."""
    calls: list[int] = []
    router.register_forward_hook(lambda _module, args, _output: calls.append(args[0].shape[-2]))
    return calls


@pytest.mark.parametrize("prefix", [4, 7])
def test_a_document_is_routed_once(prefix: int, tmp_path: Path) -> None:
    """Texts of 9, 7 and 5 tokens: with a prefix of 7, the last text's route is complete two steps after the prompt."""
    model, tokenizer, method = routed(granularity="sample", prefix_tokens=prefix)
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    batch = batch_of(left=True)
    assert method.router is not None
    wanted = by_recomputing(model, batch, 14)
    for one, router in ((model, method.router), (again, again.methods["layer_routing"].router)):
        calls = asked(router)
        assert torch.equal(one.generate(**batch, **GREEDY), wanted)
        assert len(calls) == 1 + max(0, prefix - 5)


@pytest.mark.parametrize("policy", ["gumbel", "random"])
def test_beams_take_their_routes_along(policy: str) -> None:
    """Texts with routes of their own: a beam that moves to another row keeps its text's."""
    model, _, method = routed(policy=policy, granularity="sample", prefix_tokens=7)
    batch = batch_of(left=True)
    beams = {**GREEDY, "num_beams": 3}
    found = model.generate(**batch, **beams)
    assert method.route is not None and len({str(row) for row in method.route.weight.tolist()}) > 1
    assert torch.equal(found, model.generate(**batch, **beams, use_cache=False))


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_an_emptied_cache_forgets_the_last_text(granularity: str) -> None:
    model, _, _ = routed(granularity=granularity, prefix_tokens=4)
    cache = StaticCache(config=model.config, max_cache_len=32)
    first, second = (batch_of(rows=1, length=length, padded=False) for length in (9, 11))
    logits = {}
    with torch.no_grad():
        for name, text in (("first", first), ("second", second)):
            cache.reset()
            logits[name] = model(**text, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits["second"], model(**second).logits)
    assert not torch.allclose(logits["first"][0, -1], logits["second"][0, -1])


@torch.no_grad()
def operations_of_a_step(model: Any) -> int:
    """Torch operations of one decoding step after nine tokens."""
    ids = torch.randint(3, 1000, (1, 9), generator=torch.Generator().manual_seed(1))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with Operations() as operations:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    return operations.count


def test_operations_of_a_step() -> None:
    """All gates open, so that what is left is bookkeeping: none for a route that is kept, three for a mask."""
    model, _, method = routed(granularity="sample", prefix_tokens=4)
    method.budget.set_threshold(torch.tensor(-1e9))

    kept = operations_of_a_step(model)
    with method.execution.under(torch.ones(len(method.blocks))):
        mask = operations_of_a_step(model)
    method.set_routing("removed")
    full = operations_of_a_step(model)
    assert kept == full and mask <= full + 3
    method.set_routing("on")
    method.budget.set_threshold(torch.tensor(1e9))
    closed = (full - operations_of_a_step(model)) / len(method.blocks)
    assert closed > 30, "of a closed block only keys and values are made"


def test_a_route_a_token_costs_its_router_and_four_operations() -> None:
    """The gates compared with the threshold, made numbers, and copied once; which tokens are real is not asked."""
    model, _, method = routed(granularity="token")
    method.budget.set_threshold(torch.tensor(-1e9))
    assert method.router is not None and method.execution.anatomy is not None

    routed_step = operations_of_a_step(model)
    with torch.no_grad(), Operations() as router:
        method.router(torch.zeros(1, 1, method.execution.anatomy.hidden_size))
    method.set_routing("removed")
    assert routed_step <= operations_of_a_step(model) + router.count + 4


def test_gates_of_one_token_a_row_read_as_those_of_many() -> None:
    """The host's copy of a step against the copy of a longer forward with the same gates."""
    stream = torch.Generator().manual_seed(5)
    for rows in (1, 3, 6):
        for values in ((0.0, 1.0), (0.0, 0.5, 1.0), (1.0,), (0.0,), (0.5,)):
            drawn = torch.randint(len(values), (rows, 1, 4), generator=stream)
            weight = torch.tensor(values)[drawn]
            step, longer = HostGates(weight), HostGates(weight.repeat(1, 2, 1))
            assert torch.equal(step.opened, longer.opened[:, :1])
            assert torch.equal(step.ones, longer.ones[:, :1])
            for first in range(4):
                one, two = step.of_block(first, first + 1), longer.of_block(first, first + 1)
                assert (one.kind, one.hard) == (two.kind, two.hard)
                found = one.tokens(0, rows, 1, weight.device).flat_M.tolist()
                assert found == weight[:, 0, first].nonzero()[:, 0].tolist()
