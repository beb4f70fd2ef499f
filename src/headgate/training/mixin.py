"""MethodsMixin: the methods inside any transformers.Trainer.

The trainer's own loop, precision, accumulation and logging stay as they are. What is overridden: the
training step (``gated``), the optimizer and schedule, one per stage (``staged``), the gradient reduction
between replicas (``replicas``), checkpoints and logs (``saving``), and the batches where a method forms its
own (``viewed``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.compose import MethodStack
from headgate.methods.stage import Stage
from headgate.models.anatomy import describe
from headgate.training import replicas
from headgate.training.accounting import Stopwatch
from headgate.training.checks import FiniteWatch
from headgate.training.config import LossChoice, ScheduleClock
from headgate.training.curriculum import Curriculum
from headgate.training.gated import GatedTraining, Window
from headgate.training.loss import choose_loss
from headgate.training.objective import check_override, objective_override
from headgate.training.saving import SavedTraining
from headgate.training.signals import StopSignals
from headgate.training.staged import StagedTraining
from headgate.training.telemetry import Telemetry
from headgate.training.viewed import ViewedTraining


class MethodsMixin(GatedTraining, StagedTraining, SavedTraining, ViewedTraining):
    """Put before a transformers.Trainer: ``class MyTrainer(MethodsMixin, SFTTrainer)``.

    Args (besides the trainer's own):
        methods: what routes and gates; attached here, detached by ``detach_methods``.
        stages: a curriculum; None takes the methods' own, or one stage over ``args.learning_rate``.
        loss: ``auto``, ``plain`` (the model's own) or ``chunked`` (no [B, T, V] logits). A trainer that overrides
            ``compute_loss``, or has a ``compute_loss_func``, trains that loss instead.
        label_smoothing: of the chunked loss.
        schedule_clock: whether a window in which nothing was accepted advances the schedule (``offered``).
    """

    def __init__(
        self,
        *args: Any,
        methods: Sequence[Method] = (),
        stages: Sequence[Stage] | None = None,
        loss: LossChoice = "auto",
        label_smoothing: float = 0.0,
        schedule_clock: ScheduleClock = "offered",
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, nn.Module):
            raise ConfigError("HeadgateTrainer needs a loaded model: pass model=...")
        self.methods = MethodStack(methods)
        self.anatomy = describe(model)
        self.base_is_frozen = self.anatomy.model is model and self.methods.brings_adapter
        if self.base_is_frozen:
            model.requires_grad_(False)
        self._adapter_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.methods.set_seed(_seed_of(args, kwargs))
        self.methods.attach(self.anatomy)
        object.__setattr__(model, "headgate_methods", self.methods)
        super().__init__(*args, **kwargs)
        trainer_args: Any = self.args  # type: ignore[has-type]
        if trainer_args.label_smoothing_factor:
            raise ConfigError("use HeadgateTrainer(label_smoothing=...) instead of label_smoothing_factor")
        self.methods.to(trainer_args.device)
        self.override = objective_override(self, (MethodsMixin, GatedTraining))
        if self.override is not None:
            check_override(self.override, self.methods, loss, label_smoothing)
            loss = "plain"
        self.loss_choice = choose_loss(loss, self.anatomy, label_smoothing, bool(self.methods.observing_head))
        self.label_smoothing, self.schedule_clock = label_smoothing, schedule_clock
        self._given_stages = list(stages) if stages is not None else None
        self.base_model: dict[str, Any] | None = None  # the recipe's model block, to load it again
        self.curriculum: Curriculum | None = None
        self.telemetry, self.stopwatch = Telemetry(), Stopwatch()
        self.signals = StopSignals()
        self.finite_watch = FiniteWatch(trainer_args.output_dir)
        self.micro_step, self.trained_tokens, self.flops, self.summed_loss = 0, 0.0, 0.0, 0.0
        self.window = Window()
        self._checked_stage = -1
        self._resume_stage = 0
        replicas.take_over_reduction(self.accelerator)  # type: ignore[attr-defined]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = [*self.methods.columns(), "segment_ids", "position_ids", "example_id", "labels"]
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *extra]))


def _seed_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
    return int(getattr(training_args, "seed", 0))
