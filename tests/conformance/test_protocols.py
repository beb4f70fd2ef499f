"""A Method is small; what one method alone needs is a protocol, and half a protocol is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from headgate.config import StrictConfig
from headgate.errors import ConfigError
from headgate.methods import protocols
from headgate.methods.base import Method
from headgate.methods.compose import MethodStack
from headgate.methods.registry import method_class
from headgate.methods.stage import Stage

from .examined import NAMES

MOST_MEMBERS = 23


class Bare(Method):
    name = "protocols_bare"

    class Config(StrictConfig):
        """No settings."""


def test_a_method_has_about_twenty_members() -> None:
    members = [name for name in vars(Method) if not name.startswith("_")] + ["name", "Config"]
    assert len(set(members)) <= MOST_MEMBERS, sorted(members)


def test_no_member_of_a_protocol_is_one_of_method() -> None:
    """A default on Method would make every method implement the protocol."""
    for protocol in protocols.PROTOCOLS:
        assert not protocols.members(protocol) & set(dir(Method)), protocol.__name__


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS, ids=lambda p: p.__name__)
def test_every_protocol_has_a_method_that_answers_as_it_is_asked(protocol: type) -> None:
    """Implementations take the parameters that the protocol names; a protocol that nobody implements is dead."""
    implementing = [kind for name in NAMES for kind in [method_class(name)] if _has_all(kind, protocol)]
    assert implementing, f"no method implements {protocol.__name__}"
    for kind in implementing:
        for name in protocols.members(protocol):
            asked, answer = vars(protocol)[name], inspect.getattr_static(kind, name)
            if isinstance(asked, property):
                assert not inspect.isfunction(answer), f"{kind.__name__}.{name} is a property, not a function"
                continue
            assert list(inspect.signature(asked).parameters) == list(inspect.signature(answer).parameters), (
                f"{kind.__name__}.{name}"
            )


def _has_all(kind: type, protocol: type) -> bool:
    return all(hasattr(kind, name) for name in protocols.members(protocol))


def test_half_a_protocol_is_refused_by_name() -> None:
    class Half(Bare):
        def data_view(self, batches: Any, epoch: Any = None) -> Any:
            return batches

    with pytest.raises(ConfigError, match=r"Half has data_view but no forms_batches: .*FormsBatches"):
        MethodStack([Half()])


def test_asking_reads_no_property() -> None:
    """Before it is attached, a property may have no answer; to learn whether it exists must not ask it."""

    class Shy(Bare):
        @property
        def lowest_block(self) -> int:
            raise RuntimeError("asked too early")

    method = Shy()
    assert protocols.having([method], protocols.BoundsBackward) == [method]
    assert protocols.having([Bare()], protocols.BoundsBackward) == []


def test_what_no_method_says_is_what_a_trainer_alone_does() -> None:
    stack = MethodStack([Bare()])
    loss = torch.tensor(2.0)
    step: Any = None
    assert stack.renormalizes and not stack.skips_blocks
    assert stack.cost(step) == protocols.StepCost(1.0, 0.0, 0.0)
    assert stack.weighed(loss, step) is loss
    assert stack.partial_blocks() == [] and stack.head_observers(step) == ()
    assert stack.substage(None) is None and stack.vote(step) is None
    assert stack.data.batch_former() is None and stack.data.row_changes(Stage(name="s", train={})) == []
    assert not stack.evaluation.watches_validation


class Costly(Bare):
    """Costs, weighs and changes by its ``factor``."""

    name = "protocols_costly"
    factor = 0.5

    def cost(self, step: Any) -> protocols.StepCost:
        return protocols.StepCost(self.factor, forwards=self.factor, heads=1.0)

    def loss_weight(self, step: Any) -> float:
        return self.factor

    def substage(self, step: Any) -> str | None:
        return f"by {self.factor}"


class Dear(Costly):
    name = "protocols_dear"
    attach_order = 1
    factor = 0.25


def test_shares_multiply_and_forwards_add() -> None:
    stack = MethodStack([Dear(), Costly()])
    step: Any = None
    assert stack.cost(step) == protocols.StepCost(0.125, 0.75, 2.0)
    assert stack.weighed(torch.tensor(8.0), step) == 1.0
    assert stack.substage(None) == "by 0.5; by 0.25"


def test_a_method_without_routing_is_named() -> None:
    with (
        pytest.raises(ConfigError, match=r"protocols_bare has no routing to set \(asked for 'removed'\)"),
        MethodStack([Bare()]).evaluation.routing("removed"),
    ):
        pass
