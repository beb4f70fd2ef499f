"""LayerRouting as a Method: a router or a rule, a budget, a teacher, and the forward that they act in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from torch import Tensor, nn

from headgate.config import build_config
from headgate.errors import ConfigError, ModelError
from headgate.methods.base import Method
from headgate.methods.context import Context
from headgate.methods.costs import Reading, StepCost
from headgate.methods.layer_routing import calibration, learned, phases
from headgate.methods.layer_routing.budget import Budget
from headgate.methods.layer_routing.choosing import Choosing
from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.fallback import Fallback
from headgate.methods.layer_routing.figures import DepthRecord, telemetry
from headgate.methods.layer_routing.forward import RoutedForward
from headgate.methods.layer_routing.policies import decide, fixed_gates, route_losses
from headgate.methods.layer_routing.route import Route, Situation, fixed_route
from headgate.methods.layer_routing.shares import Shares, open_rates
from headgate.methods.layer_routing.teacher import Teacher
from headgate.methods.stage import Stage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch
from headgate.modules.layer_router import LayerRouter
from headgate.modules.structure import Structure
from headgate.ops.randomness import derive_seed, generator

if TYPE_CHECKING:
    from headgate.methods.stage import ScheduledStage

PURPOSE = "layer_routing"


class LayerRouting(Method):
    """Which blocks run for a batch, a document or a token; see the package docstring.

    State: the ``router``, the ``budget``, the ``patches``, and ``fixed`` (gates of truncate and static, drop probabilities of
    stochastic depth).
    """

    name = "layer_routing"
    Config = LayerRoutingConfig
    attach_order = 10
    skips_blocks = True
    adapter_alone = True
    neutral: ClassVar[Mapping[str, object]] = {"policy": "dense", "granularity": "batch", "kd": False}
    telemetry_names = ("routing/<part>",)
    citation = (
        "@software{dynamiclayerrouting2025,\n"
        "  title={Dynamic Layer Routing for LLMs}, author={N0AHZACH}, year={2025},\n"
        "  url={https://github.com/N0AHZACH/Research}\n}"
    )
    fixed: Tensor
    shares: Shares

    def __init__(self, config: LayerRoutingConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.router: LayerRouter | None = None
        self.fallback: Fallback | None = None
        self.patches = nn.ModuleList()
        self.budget = Budget(self.config)
        self.teacher = Teacher(self.config)
        self.record = DepthRecord(self.config)
        self.execution = RoutedForward(self.config, self.decide, self.record.add)
        self.choosing = Choosing(self.config, self.execution, self.budget)
        self.hidden_size = self.num_blocks = 0
        self.blocks = range(0)
        self._step: Step | None = None
        self._phase: str | None = None

    @property
    def reads_hidden(self) -> bool:
        return bool(self.config.kd)

    @property
    def route(self) -> Route | None:
        """Of the last forward."""
        return self.execution.now.route

    # -- installation ---------------------------------------------------------------------------------
    def _build(self, hidden_size: int, num_blocks: int) -> None:
        config = self.config
        self.hidden_size, self.num_blocks = hidden_size, num_blocks
        self.blocks = config.routable(num_blocks)
        gates = len(self.blocks) * config.gates_per_block
        self.router = learned.build_router(config, hidden_size, gates, self.seed)
        if config.fallback == "mask":
            self.fallback = Fallback(gates)
        self.patches.extend(learned.build_patches(config, hidden_size, gates, self.seed))
        self.register_buffer("fixed", fixed_gates(config, num_blocks))

    def attach(self, anatomy: Anatomy) -> None:
        """Install the gates. Raises ModelError for a router of another model or a family without the engine."""
        if not self.num_blocks:
            self._build(anatomy.hidden_size, anatomy.num_blocks)
        if (self.hidden_size, self.num_blocks) != (anatomy.hidden_size, anatomy.num_blocks):
            raise ModelError(
                f"the router was made for {self.num_blocks} blocks of width {self.hidden_size}; this model has "
                f"{anatomy.num_blocks} of width {anatomy.hidden_size}: load it with its own base model"
            )
        self.shares = Shares.of(self.config, anatomy, self.blocks)
        self.choosing.attach(self.shares, len(self.blocks), self.fixed, self.fallback)
        for handle in self.execution.install(anatomy, self.blocks, list(self.patches)):
            self.handles.append(handle)

    def detach(self) -> None:
        super().detach()
        self.execution.uninstall()

    @property
    def attached(self) -> bool:
        return self.execution.anatomy is not None

    def claims(self) -> Sequence[str]:
        return ("routes_blocks",)

    # -- what is trained, what is saved -------------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return learned.groups(self.router, self.patches, self.config)

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        return learned.rates(self.config, learning_rate)

    def structure(self) -> Structure:
        """Config and sizes, and what the last validation counted: a run's summary follows from saved state alone."""
        sizes = {"hidden_size": self.hidden_size, "num_blocks": self.num_blocks}
        return {**super().structure(), **sizes, "validation": self.record.counts()}

    def restore(self, structure: Structure) -> None:
        self.record.restore(structure.get("validation", []))

    @classmethod
    def from_structure(cls, structure: Structure) -> LayerRouting:
        method = cls(build_config(cls.Config, structure["config"]))
        method._build(structure["hidden_size"], structure["num_blocks"])
        method.restore(structure)
        return method

    # -- the decision -----------------------------------------------------------------------------------
    def decide(self, hidden: Tensor, context: Context, training: bool) -> Route | None:
        """The route of a forward, from what the router reads."""
        step = self._step if training else None
        if (held := self.choosing.held(training, step)) is not None:
            return fixed_route(held.to(hidden.device), context)
        now = Situation(
            training=training,
            temperature=self.budget.temperature(step),
            threshold=self.budget.threshold,
            salt=derive_seed(self.seed, step.micro_step if step else 0, PURPOSE),
            streams=partial(step.generator, PURPOSE) if step else partial(generator, self.seed, 0, PURPOSE),
            shuffled=self.execution.routing == "shuffled",
            share=self.shares.of_gates(self.config.target_utilization),
            fixed=self.fixed,
            noise=phases.noise_in(self.config, step),
            per_gate=self.shares.per_gate,
            routed=self.config.target_utilization - self.shares.always,
        )
        return decide(self.config, self.router, hidden, context, now)

    def calibrate(
        self,
        batches: Iterable[Batch],
        target: float | None = None,
        tokens: int = calibration.CALIBRATION_TOKENS,
    ) -> None:
        """Set the inference threshold so that utilization is ``target`` on the first ``tokens`` real ones.

        Nothing happens where no threshold decides: a policy without a router, a run that settled on its mask, routing
        removed, no token that is free.
        """
        if self.router is not None:
            self.choosing.calibrate(batches, target, tokens)

    # -- training ---------------------------------------------------------------------------------------
    def check_model(self, anatomy: Anatomy) -> None:
        """Raises ConfigError where no block is left to route, the target cannot be met, or the teacher is absent."""
        self.config.routable(anatomy.num_blocks)
        self.teacher.check(anatomy)

    def check_run(self, max_steps: int) -> None:
        if (anatomy := self.execution.anatomy) is not None:
            self.config.routable(anatomy.num_blocks)
            self.teacher.prepare(anatomy)

    def stages(self, learning_rate: float) -> Sequence[Stage]:
        """The phases of a run that trains its search; none otherwise."""
        return phases.stages_of(self.config, learning_rate, self.group_learning_rates(learning_rate))

    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        self.choosing.begin(scheduled.stage, probe, self.router)

    def take_readings(self) -> Sequence[Reading]:
        return self.choosing.take_readings()

    def on_step_start(self, step: Step) -> None:
        self._step, self._phase = step, phases.phase_of(step.stage)
        self.execution.forget()

    def loss_weight(self, step: Step) -> float:
        return 1 - self.config.kd_weight if self.teacher.teaches(step) else 1.0

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """``routing_budget``, ``routing_kd``, ``routing_policy``, ``routing_entropy``, ``routing_member``."""
        route, anatomy = self.route, self.execution.anatomy
        if route is None or anatomy is None:
            return {}
        parts = {**self.budget.losses(route, step, self.shares), **route_losses(self.config, route)}
        if self.teacher.teaches(step):
            parts["routing_kd"] = self.config.kd_weight * self.teacher.loss(
                anatomy, step, self.execution.paused()
            )
        return parts

    def _executed_share(self) -> float | Tensor:
        """What this forward ran of the blocks' FLOPs: everything under ``masked``, keys and values included."""
        if self.route is None:
            return 1.0
        return self.shares.executed(open_rates(self.route), self.config, self.execution.training_engine())

    def cost(self, step: Step) -> StepCost:
        """The blocks that ran; besides, the router's own first forward, and the teacher's."""
        first = self.shares.first_forward if self.attached else 0.0
        taught = float(step.accepted and self.teacher.teaches(step))
        return StepCost(self._executed_share(), forwards=first + taught)

    @torch.no_grad()
    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """The budget sees accepted batches only, and moves with the optimizer."""
        route, self._step = self.route, None
        self.execution.release()
        line: dict[str, Tensor] = {}
        if route is not None and step.accepted:
            self.budget.observe(route, step, self.shares)
            if step.should_log:
                executed = torch.as_tensor(self._executed_share()) + self.shares.first_forward
                line = {**telemetry(route), "routing/executed": executed}
        if step.is_window_end and (used := self.budget.update(step)) is not None and step.should_log:
            line |= {"routing/utilization": used, **self.budget.telemetry(step)}
        return line

    # -- evaluation -------------------------------------------------------------------------------------
    def on_evaluation_start(self, skill: str | None, probe: Iterable[Batch] | None) -> None:
        """Where the budget is one that a threshold holds, it is set on validation data, as the router is now."""
        self.record.stop()  # the forwards that calibrate are no part of the validation
        asked = self.config.calibration_target is not None and self.routing != "removed"
        if asked and probe is not None:
            self.choosing.hear(probe, self._phase)
        self.record.start(skill)

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:
        self.record.stop()

    def summary(self) -> Mapping[str, object]:
        """What training held (running means), and what the last validation measured: ``..._eval``."""
        self.budget.warn_if_unmet()
        choice = (
            self.fallback.figures(self.config.gates_per_block, self.blocks.start) if self.fallback else {}
        )
        return {
            **self.budget.figures(),
            **choice,
            **self.record.of_validation(self.shares, self.execution.engine),
        }

    def start_figures(self, padding: int | None) -> None:
        self.record.start_task(padding)

    def evaluation_figures(self) -> Mapping[str, float]:
        """``depth`` (utilization on real tokens) and ``executed_share`` (of the blocks' FLOPs) of an evaluation."""
        figures = self.record.of_task(self.shares, self.execution.engine, self.routing)
        self.record.stop()
        return figures

    @property
    def routing(self) -> str:
        """How blocks run at evaluation: ``on``, ``removed`` (full depth), ``shuffled`` (gates permuted over tokens)."""
        return self.execution.routing

    def set_routing(self, routing: str) -> None:
        known = get_args(LayerRoutingConfig.model_fields["eval_routing"].annotation)
        if routing not in known:
            raise ConfigError(f"routing {routing!r} is not one of {', '.join(known)}")
        self.execution.routing = routing
