"""The parts of a trainer with methods, by name, and what is read of them from outside. Nothing is written here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headgate.methods.compose import MethodStack
from headgate.methods.stage import ScheduledStage
from headgate.models.anatomy import Anatomy, Batch, Columns, model_inputs
from headgate.training.accounting import Stopwatch
from headgate.training.checks import FiniteWatch
from headgate.training.curriculum import Curriculum
from headgate.training.objective import Objective
from headgate.training.run_state import RunState, Totals
from headgate.training.saver import Saver
from headgate.training.signals import StopSignals
from headgate.training.stages import Stages
from headgate.training.telemetry import Telemetry
from headgate.training.viewed import ViewedBatches
from headgate.training.window import Window, Windows

Base: Any = object  # any Trainer may stand behind the mixin


class TrainerParts(Base):
    """What ``MethodsMixin`` is composed of.

    Attributes:
        methods, anatomy: of the model. base_is_frozen: whether methods are all that trains.
        task_objective: whose loss (``objective`` is transformers' own, of a hyperparameter search). stages: what trains when. windows: gradient accumulation. run_state: the counters.
        saver: checkpoints. batches: where a method forms its own. telemetry, stopwatch, signals, finite_watch.
        base_model: the recipe's model block, to load the base again; None names the model's own path.
    """

    methods: MethodStack
    anatomy: Anatomy
    base_is_frozen: bool
    task_objective: Objective
    stages: Stages
    windows: Windows
    run_state: RunState
    saver: Saver
    batches: ViewedBatches | None
    telemetry: Telemetry
    stopwatch: Stopwatch
    signals: StopSignals
    finite_watch: FiniteWatch
    base_model: dict[str, object] | None
    # of the Trainer behind it
    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    # -- what trains ----------------------------------------------------------------------------------
    @property
    def curriculum(self) -> Curriculum | None:
        """The stages of this run and where it stands in them; None before training."""
        return self.stages.curriculum

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable tensor by group: ``lora`` first, then the methods' own."""
        return self.stages.groups

    @property
    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Every trainable tensor by name: the adapter's, then the methods' own."""
        return self.stages.named_trainable

    @property
    def loss_choice(self) -> str:
        """``plain`` or ``chunked``."""
        return self.task_objective.choice

    # -- what was done --------------------------------------------------------------------------------
    @property
    def window(self) -> Window:
        """The gradient accumulation window in progress."""
        return self.windows.current

    @property
    def micro_step(self) -> int:
        """Micro-batches offered to this rank."""
        return self.run_state.micro_step

    @property
    def trained_tokens(self) -> Tensor | float:
        """Of this rank."""
        return self.run_state.trained_tokens

    @property
    def flops(self) -> Tensor | float:
        """Executed by this rank."""
        return self.run_state.flops

    def totals(self) -> Totals:
        """What all ranks did together. Collective."""
        return self.run_state.totals()

    def summary(self) -> dict[str, object]:
        """Final figures of the methods, for the run's result."""
        return self.methods.summary()

    def detach_methods(self) -> None:
        """Take every method out of the model."""
        self.methods.detach()

    @property
    def watches_validation(self) -> bool:
        """Whether a method counts what it sees of a validation: every rank must then see all of it."""
        return self.methods.evaluation.watches_validation

    # -- what a trainer may change --------------------------------------------------------------------
    def model_inputs(self, batch: Batch) -> Columns:
        """What the model itself is called with: the methods' extra columns are left out."""
        return model_inputs(batch)

    def stage_dataset(self, scheduled: ScheduledStage) -> Any:
        """The part of the training data that a stage reads."""
        return self.train_dataset
