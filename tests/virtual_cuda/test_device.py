"""The stand-in for an accelerator's memory: each planted wait is seen where it stands, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headgate.testing.virtual_device import VirtualDevice

HERE = Path(__file__).parent
PLANTED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "nonzero": lambda x: (x > 0).nonzero(),
    "boolean index": lambda x: x[x > 0],
    "assignment under a boolean index": lambda x: x.clone().__setitem__(x > 0, x[:1].expand(4)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "index by a scalar": lambda x: x[x.argmax()],
    "copy into a host tensor": lambda x: torch.zeros(4).copy_(x),
    "of a tensor made there": lambda x: float(torch.ones(3, device=x.device).sum()),
    "of a host tensor moved there": lambda x: float(torch.ones(()).to(x.device)),
    "in a view": lambda x: float(x.view(2, 2)[0, 1]),
}
QUIET: dict[str, Callable[[Tensor], object]] = {
    "of a host tensor": lambda x: float(torch.ones(3).sum()),
    "a number under a boolean index": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0).sum(),
    "index by integers": lambda x: x[torch.tensor([0, 1])],
    "device math": lambda x: (x.softmax(0) @ x).clamp(min=0),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_wait_is_counted_once_where_it_stands(name: str) -> None:
    device, x = VirtualDevice([HERE]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    device.put(x)
    with device.watching():
        PLANTED[name](x)
    (place,) = device.places
    assert sum(device.places.values()) == 1 and place.startswith("test_device.py:"), device.places


@pytest.mark.parametrize("name", QUIET)
def test_what_makes_nobody_wait_is_not_counted(name: str) -> None:
    device, x = VirtualDevice([HERE]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    device.put(x)
    with device.watching():
        QUIET[name](x)
    assert not device.places


def test_one_copy_to_the_host_pays_for_all_that_is_read_of_it() -> None:
    device, x = VirtualDevice([HERE]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    device.put(x)
    with device.watching():
        host = (x > 2).cpu()
        assert bool(host.any()) and len(host.nonzero()) == 2 and host.tolist() == [True, True, False, False]
    assert sum(device.places.values()) == 1


def test_a_read_in_the_backward_is_counted() -> None:
    class Reader(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * float(grad.sum())

    device, x = VirtualDevice([HERE]), torch.ones(3, requires_grad=True)
    device.put(x)
    with device.watching():
        Reader.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert sum(device.places.values()) == 1


def test_uploads_that_are_waited_for_are_counted_and_others_are_not() -> None:
    device, x = VirtualDevice([HERE]), torch.ones(3)
    device.put(x)
    with device.watching():
        torch.tensor([1.0, 2.0], device=x.device)
        torch.ones(2).to(x.device)
        torch.ones(2).to(x.device, non_blocking=True)
        x.to(x.device)
    assert sum(device.uploads.values()) == 2 and not device.places


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    device = VirtualDevice([HERE])
    for _ in range(50):
        device.put(torch.ones(64))
        assert not device.holds(torch.ones(64))
