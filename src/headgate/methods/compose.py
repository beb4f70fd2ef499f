"""Composition: several methods on one model act as one.

Every verb is a loop, and every loop over the methods of a run stands here, in ``compose_data`` or in ``compose_evaluation``.
Methods attach in one fixed order, innermost first; apart from that they commute, because each writes only its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from headgate.errors import CheckpointError, ConfigError
from headgate.methods import protocols
from headgate.methods.base import Method
from headgate.methods.compose_data import DataNeeds
from headgate.methods.compose_evaluation import EvaluationVerbs
from headgate.methods.costs import Reading, StepCost
from headgate.methods.protocols import having
from headgate.methods.stage import LORA_GROUP, ScheduledStage, Stage, whole_run
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch
from headgate.modules.fused_head import HeadObserver
from headgate.modules.structure import Structure


class MethodStack(nn.Module):
    """The methods of one run, attached together.

    Attributes:
        data: what the methods need of the data (see ``DataNeeds``). evaluation: how they act when the model is evaluated
            (see ``EvaluationVerbs``).

    Raises ConfigError, naming both, when two methods would replace the same part of the model, share a name, or use the same
    parameter group; and naming what is missing, when a method implements a part of a protocol.
    """

    def __init__(self, methods: Iterable[Method] = ()) -> None:
        super().__init__()
        self.methods: Sequence[Method] = sorted(methods, key=lambda method: method.attach_order)
        self.by_name = nn.ModuleDict({method.name: method for method in self.methods})
        if len(self.by_name) < len(self.methods):
            raise ConfigError(f"a method is given twice: {self.names}")
        for method in self.methods:
            protocols.check_protocols(method)
        self.data, self.evaluation = DataNeeds(self), EvaluationVerbs(self)

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __getitem__(self, name: str) -> Method:
        method = self.by_name[name]
        assert isinstance(method, Method)
        return method

    def __len__(self) -> int:
        return len(self.methods)

    @property
    def names(self) -> list[str]:
        return [method.name for method in self.methods]

    @property
    def brings_adapter(self) -> bool:
        """Whether a method is what is trained: a base without a PEFT adapter is then frozen."""
        return any(method.is_adapter for method in self.methods)

    def adapters(self) -> MethodStack:
        """Those that are what is trained."""
        return MethodStack(method for method in self.methods if method.is_adapter)

    # -- installation ---------------------------------------------------------------------------------
    def check_model(self, anatomy: Anatomy) -> None:
        for method in having(self, protocols.FitsModel):
            method.check_model(anatomy)

    def set_seed(self, seed: int) -> None:
        """Give a seed to every method that has none of its own."""
        for method in self.methods:
            method.seed = method.seed or seed

    def attach(self, anatomy: Anatomy) -> None:
        """Attach all, innermost first; undo everything if one refuses."""
        owners: dict[str, str] = {}
        try:
            for method in self.methods:
                method.attach(anatomy)
                for claim in (
                    c for exclusive in having([method], protocols.Exclusive) for c in exclusive.claims()
                ):
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

    def structure(self) -> Structure:
        return {method.name: method.structure() for method in self.methods}

    def restore(self, structures: Mapping[str, Structure], where: str) -> None:
        """Bring attached methods to the saved structures. Raises CheckpointError where the methods are other ones."""
        if set(structures) != set(self.names):
            raise CheckpointError(
                f"{where} was saved with methods {sorted(structures)}, this run has {sorted(self.names)}"
            )
        for method in self.methods:
            for restorable in having([method], protocols.Restorable):
                restorable.restore(structures[method.name])

    # -- what is trained ------------------------------------------------------------------------------
    def detach_all_but(self, kept: Method) -> None:
        for method in reversed(self.methods):
            if method is not kept:
                method.detach()

    def configs(self) -> dict[str, object]:
        """Each method's settings, by its name."""
        return {method.name: method.config for method in self.methods}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for method in self.methods:
            for name, parameters in method.parameter_groups().items():
                if name in groups or name == LORA_GROUP:
                    raise ConfigError(f"parameter group {name!r} of {method.name} exists already")
                groups[name] = list(parameters)
        return groups

    def group_learning_rates(self, learning_rate: float, leave_out: Iterable[str] = ()) -> dict[str, float]:
        """Peak rate of each group; of all methods but those named."""
        rates: dict[str, float] = {}
        for method in self.methods:
            if method.name not in leave_out:
                rates.update(method.group_learning_rates(learning_rate))
        return rates

    def curricula(self, learning_rate: float) -> dict[str, Sequence[Stage]]:
        """The stages of each method that brings some."""
        brought = {
            method.name: curriculum.stages(learning_rate)
            for method in self.methods
            for curriculum in having([method], protocols.BringsCurriculum)
        }
        return {name: stages for name, stages in brought.items() if stages}

    def stages(self, learning_rate: float) -> list[Stage]:
        """The one curriculum of the run: a method's own stages, with the other methods' groups added.

        A method without a curriculum trains its groups in every stage at its own rates. Two methods that
        each bring a curriculum is a ConfigError: write ``training.stages`` by hand.
        """
        curricula = self.curricula(learning_rate)
        if len(curricula) > 1:
            raise ConfigError(
                f"{' and '.join(curricula)} each bring a curriculum: write training.stages by hand to order them"
            )
        rates = self.group_learning_rates(learning_rate, leave_out=curricula)
        if not curricula:
            return whole_run(learning_rate, rates)
        (stages,) = curricula.values()
        return [stage.model_copy(update={"train": {**rates, **stage.train}}) for stage in stages]

    def check_run(self, max_steps: int) -> None:
        for method in self.methods:
            method.check_run(max_steps)

    # -- one micro-batch --------------------------------------------------------------------------------
    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        for method in self.methods:
            method.on_stage_start(scheduled, probe)

    def substage(self, step: Step | None) -> str | None:
        """Let each change its parameters; why a sub-stage begins, or None. Every method is asked."""
        reasons = [method.substage(step) for method in having(self, protocols.ChangesParameters)]
        return "; ".join(reason for reason in reasons if reason is not None) or None

    def on_stage_end(self, scheduled: ScheduledStage) -> None:
        for method in having(self, protocols.EndsStages):
            method.on_stage_end(scheduled)

    @property
    def holding_out(self) -> bool:
        """Whether a method may take rows out of the labels."""
        return any(True for _ in having(self, protocols.HoldsOut))

    def held_out_tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Trained tokens of a batch that its forward will not train on; the most that one method takes out."""
        return max((method.held_out_tokens(batch) for method in having(self, protocols.HoldsOut)), default=0)

    def on_step_start(self, step: Step) -> None:
        for method in self.methods:
            method.on_step_start(step)

    def vote(self, step: Step) -> Tensor | None:
        """Logical AND of the votes; None when all abstain. Every method is asked, whatever the others say."""
        votes = [vote for method in self.methods if (vote := method.vote(step)) is not None]
        return torch.stack([vote.reshape(()).bool() for vote in votes]).all() if votes else None

    def partial_blocks(self) -> list[int]:
        """The blocks after which a vote is asked inside the forward."""
        blocks = [method.partial_block for method in having(self, protocols.StopsForward)]
        return [block for block in blocks if block is not None]

    def head_observers(self, step: Step) -> tuple[HeadObserver, ...]:
        observers = [method.head_observer(step) for method in having(self, protocols.ObservesHead)]
        return tuple(observer for observer in observers if observer is not None)

    @property
    def observing_head(self) -> list[str]:
        """Names of the methods that read the head's errors."""
        return [m.name for m in self.methods if having([m], protocols.ObservesHead)]

    @property
    def reading_hidden(self) -> list[str]:
        """Names of the methods that read what enters the head."""
        return [m.name for m in self.methods for r in having([m], protocols.ReadsHidden) if r.reads_hidden]

    def weighed(self, loss: Tensor, step: Step) -> Tensor:
        """The task loss times every method's weight; as it is where all weights are 1."""
        for method in having(self, protocols.WeighsLoss):
            weight = method.loss_weight(step)
            if isinstance(weight, Tensor) or weight != 1.0:
                loss = loss * weight
        return loss

    def losses(self, step: Step) -> dict[str, Tensor]:
        return self._merge(lambda method: method.losses(step))

    def on_step_end(self, step: Step) -> dict[str, Tensor]:
        return self._merge(lambda method: method.on_step_end(step))

    @property
    def renormalizes(self) -> bool:
        """Whether a partly accepted window's gradient is divided by what was accepted: unless a method says no."""
        return all(method.renormalizes for method in having(self, protocols.Renormalizes))

    @property
    def skips_blocks(self) -> bool:
        """Whether a trained tensor without a gradient is no mistake."""
        return any(method.skips_blocks for method in having(self, protocols.SkipsGradients))

    def cost(self, step: Step) -> StepCost:
        """Shares multiply, what was run besides adds up."""
        costs = [method.cost(step) for method in having(self, protocols.Costed)]
        share: float | Tensor = 1.0
        for cost in costs:
            share = share * cost.share
        return StepCost(share, sum(cost.forwards for cost in costs), sum(cost.heads for cost in costs))

    def take_readings(self) -> list[Reading]:
        """What was read outside the steps since the last call."""
        return [r for method in having(self, protocols.ReadsBesides) for r in method.take_readings()]

    def lowest_blocks(self) -> list[int]:
        """Of each method that trains now: the lowest block through which its gradient flows."""
        training = [m for m in self.methods if any(p.requires_grad for p in m.parameters())]
        known = having(training, protocols.BoundsBackward)
        return [method.lowest_block for method in known] + [0] * (len(training) - len(known))

    # -- what is told -----------------------------------------------------------------------------------
    def columns(self) -> dict[str, str]:
        """Extra batch columns and the method that needs each."""
        return {column: method.name for method in self.methods for column in method.columns()}

    def telemetry_names(self) -> list[str]:
        return [name for method in self.methods for name in method.telemetry_names]

    def summary(self) -> dict[str, object]:
        """Final figures of all, for the run's result."""
        return {key: value for method in self.methods for key, value in method.summary().items()}

    def _merge(self, ask: Callable[[Method], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        for method in self.methods:
            for name, value in ask(method).items():
                if name in merged:
                    raise ConfigError(f"two methods report {name!r}; the second is {method.name}")
                merged[name] = value
        return merged


def methods_of(model: object) -> MethodStack:
    """The methods on a model that a trainer or ``load`` made; an empty stack on any other."""
    methods = getattr(model, "headgate_methods", ())
    return methods if isinstance(methods, MethodStack) else MethodStack(methods)
