"""Composition: several methods on one model act as one.

Every verb is a loop. Methods attach in one fixed order, innermost first; apart from that they commute,
because each writes only its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.stage import ScheduledStage, Stage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy

LORA_GROUP = "lora"


class MethodStack(nn.Module):
    """The methods of one run, attached together.

    Raises ConfigError, naming both, when two methods would replace the same part of the model, share a
    name, or use the same parameter group.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__()
        self.methods: Sequence[Method] = sorted(methods, key=lambda method: method.attach_order)
        self.by_name = nn.ModuleDict({method.name: method for method in self.methods})
        if len(self.by_name) < len(self.methods):
            raise ConfigError(f"a method is given twice: {[method.name for method in self.methods]}")

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def attach(self, anatomy: Anatomy) -> None:
        """Attach all, innermost first; undo everything if one refuses."""
        owners: dict[str, str] = {}
        try:
            for method in self.methods:
                method.attach(anatomy)
                for claim in method.claims():
                    if claim in owners:
                        raise ConfigError(
                            f"{owners[claim]} and {method.name} both claim {claim!r}: use one of them"
                        )
                    owners[claim] = method.name
            self.parameter_groups()
        except Exception:
            self.detach()
            raise

    def detach(self) -> None:
        for method in reversed(self.methods):
            method.detach()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for method in self.methods:
            for name, parameters in method.parameter_groups().items():
                if name in groups or name == LORA_GROUP:
                    raise ConfigError(f"parameter group {name!r} of {method.name} exists already")
                groups[name] = list(parameters)
        return groups

    def stages(self, learning_rate: float) -> list[Stage]:
        """The one curriculum of the run: a method's own stages, with the other methods' groups added.

        A method without a curriculum trains its groups in every stage at its own rates. Two methods that
        each bring a curriculum is a ConfigError: write ``training.stages`` by hand.
        """
        curricula = {m.name: stages for m in self.methods if (stages := m.stages(learning_rate))}
        if len(curricula) > 1:
            raise ConfigError(
                f"{' and '.join(curricula)} each bring a curriculum: write training.stages by hand to order them"
            )
        rates: dict[str, float] = {}
        for method in self.methods:
            if method.name not in curricula:
                rates.update(method.group_learning_rates(learning_rate))
        if not curricula:
            return [Stage(name="train", share=1.0, train={LORA_GROUP: learning_rate, **rates})]
        (stages,) = curricula.values()
        return [stage.model_copy(update={"train": {**rates, **stage.train}}) for stage in stages]

    def vote(self, step: Step) -> Tensor | None:
        """Logical AND of the votes; None when all abstain. Every method is asked, whatever the others say."""
        votes = [vote for method in self.methods if (vote := method.vote(step)) is not None]
        return torch.stack([vote.reshape(()).bool() for vote in votes]).all() if votes else None

    def losses(self, step: Step) -> dict[str, Tensor]:
        return self._merge(lambda method: method.losses(step))

    def on_step_end(self, step: Step) -> dict[str, Tensor]:
        return self._merge(lambda method: method.on_step_end(step))

    def on_step_start(self, step: Step) -> None:
        for method in self.methods:
            method.on_step_start(step)

    def on_stage_start(self, scheduled: ScheduledStage, probe: Any) -> None:
        for method in self.methods:
            method.on_stage_start(scheduled, probe)

    def columns(self) -> dict[str, str]:
        """Extra batch columns and the method that needs each."""
        return {column: method.name for method in self.methods for column in method.columns()}

    def structure(self) -> dict[str, Any]:
        return {method.name: method.structure() for method in self.methods}

    def _merge(self, ask: Callable[[Method], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        for method in self.methods:
            for name, value in ask(method).items():
                if name in merged:
                    raise ConfigError(f"two methods report {name!r}; the second is {method.name}")
                merged[name] = value
        return merged
