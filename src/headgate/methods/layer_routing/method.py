"""LayerRouting as a Method: who decides, what it costs, what it is taught, and what a run keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError, ModelError
from headgate.methods.base import Method, build_config
from headgate.methods.layer_routing.bookkeeping import (
    Tally,
    follow,
    held_out,
    telemetry,
    warn_of_unmet_budget,
    worth,
)
from headgate.methods.layer_routing.config import LEARNED, LayerRoutingConfig
from headgate.methods.layer_routing.forward import RoutedForward
from headgate.methods.layer_routing.teaching import auxiliary_losses, read_teacher
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.models.block_parts import is_tuner
from headgate.models.frozen_adapter import FrozenAdapter
from headgate.modules.layer_router import LayerRouter
from headgate.ops.layer_gates import drop_rates
from headgate.ops.randomness import generator

ROUTER = "layer_router"


class LayerRouting(RoutedForward, Method):
    """Which blocks run for a batch, a document or a token; see the package docstring."""

    name = "layer_routing"
    Config = LayerRoutingConfig
    attach_order = 10
    skips_blocks = True
    citation = (
        "@software{dynamiclayerrouting2025,\n"
        "  title={Dynamic Layer Routing for LLMs}, author={N0AHZACH}, year={2025},\n"
        "  url={https://github.com/N0AHZACH/Research}\n}"
    )

    def __init__(self, config: LayerRoutingConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.router: LayerRouter | None = None
        self.routing: str = self.config.eval_routing
        self.engine: str = self.config.engine
        self.units = 2 if self.config.units == "attention_mlp" else 1
        self.hidden_size = self.num_blocks = 0
        self.blocks = range(0)
        self._anatomy: Anatomy | None = None
        self._step: Step | None = None
        self.suspended = False
        self.teacher: FrozenAdapter | None = None
        self.tally: Tally | None = None
        self._tallies: dict[str | None, Tally] = {}
        self._forget()
        for name in ("threshold", "dual", "baseline", "held"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("warm", torch.zeros((), dtype=torch.long))
        self.threshold: Tensor
        self.dual: Tensor
        self.baseline: Tensor
        self.held: Tensor
        self.warm: Tensor
        self.fixed: Tensor

    @property
    def reads_hidden(self) -> bool:
        return bool(self.config.kd)

    # -- installation ---------------------------------------------------------------------------------
    def _build(self, hidden_size: int, num_blocks: int) -> None:
        config = self.config
        self.hidden_size, self.num_blocks = hidden_size, num_blocks
        self.blocks = config.routable(num_blocks)
        count = len(self.blocks) * self.units
        if config.policy in LEARNED:
            self.router = LayerRouter(
                hidden_size,
                count,
                init_keep=config.init_keep,
                trunk_gradient=config.trunk_gradient,
                generator=generator(self.seed, 0, "layer_routing.init"),
            )
        self.register_buffer("fixed", self._fixed_gates(count))

    def _fixed_gates(self, count: int) -> Tensor:
        config, number = self.config, len(self.blocks)
        if config.policy == "stochastic_depth":
            rates = drop_rates(self.num_blocks, self.blocks.start, config.drop_rate, config.schedule)
            return rates[:number].repeat_interleave(self.units)
        open_R = torch.ones(number)
        if config.policy == "truncate":
            open_R[number - self.num_skipped :] = 0.0
        elif config.policy == "static" and config.skip is not None:
            open_R[[block - self.blocks.start for block in config.skip]] = 0.0
        return open_R.repeat_interleave(self.units)

    @property
    def num_skipped(self) -> int:
        """Whole blocks that the target leaves out, of those that have a gate."""
        return min(len(self.blocks), round((1 - self.config.target_utilization) * self.num_blocks))

    def attach(self, anatomy: Anatomy) -> None:
        """Install the gates. Raises ModelError for a router of another model or a family without the engine."""
        if not self.num_blocks:
            self._build(anatomy.hidden_size, anatomy.num_blocks)
        if (self.hidden_size, self.num_blocks) != (anatomy.hidden_size, anatomy.num_blocks):
            raise ModelError(
                f"the router was made for {self.num_blocks} blocks of width {self.hidden_size}; this model has "
                f"{anatomy.num_blocks} of width {anatomy.hidden_size}: load it with its own base model"
            )
        self._anatomy = anatomy
        self.share, self.always, self.kv_share = worth(anatomy, self.blocks, self.units)
        if self.config.policy != "dense":
            self._install(anatomy)

    def detach(self) -> None:
        super().detach()
        self._forget()
        self._anatomy = None

    @property
    def attached(self) -> bool:
        return self._anatomy is not None

    def claims(self) -> Sequence[str]:
        return ("routes_blocks",)

    # -- what is trained, what is saved -------------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {ROUTER: list(self.router.parameters())} if self.router is not None else {}

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        return {ROUTER: self.config.router_lr} if self.config.policy in LEARNED else {}

    def structure(self) -> dict[str, Any]:
        """Config and sizes, and what the last validation counted: a run's summary follows from saved state alone."""
        sizes = {"hidden_size": self.hidden_size, "num_blocks": self.num_blocks}
        counts = [[skill, *tally.counts()] for skill, tally in self._tallies.items()]
        return {**super().structure(), **sizes, "validation": counts}

    def restore(self, structure: Mapping[str, Any]) -> None:
        counts = structure.get("validation", [])
        self._tallies = {skill: Tally(tokens, opened) for skill, tokens, opened in counts}

    @classmethod
    def from_structure(cls, structure: Mapping[str, Any]) -> LayerRouting:
        method = cls(build_config(cls.Config, structure["config"]))
        method._build(structure["hidden_size"], structure["num_blocks"])
        method.restore(structure)
        return method

    # -- training ---------------------------------------------------------------------------------------
    def check_model(self, anatomy: Anatomy) -> None:
        """Raises ConfigError where no block is left to route, the target cannot be met, or the teacher is absent."""
        self.config.routable(anatomy.num_blocks)
        if self.config.teacher != "base":
            read_teacher(self.config.teacher).check(anatomy)

    def check_run(self, max_steps: int) -> None:
        """A teacher needs an adapter to switch off, and what is named as one must be there and fit the model."""
        anatomy = self._anatomy
        if self.config.kd and anatomy is not None and not any(map(is_tuner, anatomy.model.modules())):
            raise ConfigError(
                "layer_routing: kd distils from the model with its adapter off, and this model has no adapter: "
                "set lora, or methods.layer_routing.kd: false"
            )
        if self.config.teacher != "base" and anatomy is not None:
            self.check_model(anatomy)
            self.teacher = read_teacher(self.config.teacher).to(next(anatomy.model.parameters()).device)

    def on_stage_start(self, scheduled: Any, probe: Any) -> None:
        if (
            self.config.policy == "static"
            and self.config.skip is None
            and not self.warm
            and probe is not None
        ):
            from headgate.methods.layer_routing.inspect import fit_static

            fit_static(self, probe, self.num_skipped)

    def on_step_start(self, step: Step) -> None:
        self._step, self.route = step, None

    def loss_weight(self, step: Step) -> float:
        return 1 - self.config.kd_weight if self._distils(step) else 1.0

    def _distils(self, step: Step) -> bool:
        return bool(self.config.kd) and step.global_step >= self.config.kd_warmup

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """``routing_budget``, ``routing_kd``, ``routing_policy``, ``routing_entropy``, ``routing_member``."""
        if self.route is None:
            return {}
        return auxiliary_losses(self, self.route, step, distil=self._distils(step))

    def executed_share(self, step: Step) -> float | Tensor:
        """What this forward ran of the blocks' FLOPs: everything under ``masked``, keys and values included."""
        if self.route is None:
            return 1.0
        return self.executed_of(self.used(self.route), self.config.train_engine_for())

    def executed_of(self, used: Tensor, engine: str) -> float | Tensor:
        """The executed share where ``used`` of all blocks is open."""
        if engine == "masked":
            return 1.0
        makes_all_keys = self.config.routes_per == "token" and self.config.kv == "full"
        return used + (1 - used) * self.kv_share if makes_all_keys else used

    @property
    def first_forward(self) -> float:
        """Forwards that the router's features cost, in training and at inference."""
        return 1.0 if self.config.features == "prepass" else 0.0

    def extra_forwards(self, step: Step) -> float:
        """The router's own first forward, and the teacher's."""
        return self.first_forward + float(step.accepted and self._distils(step))

    @torch.no_grad()
    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """Dual variable, threshold and baseline follow the accepted batches, the same on every rank."""
        route, self._step, self._reused = self.route, None, {}
        if route is None or not step.accepted:
            return {}
        used = follow(self, route, step)
        return telemetry(self, route, step, used) if step.should_log else {}

    def on_evaluation_start(self, skill: str | None, probe: Any) -> None:
        """The threshold is set so that the budget holds on validation data, as the router is now."""
        self.tally = None
        if probe is not None and self.config.calibrate_on == "validation":
            from headgate.methods.layer_routing.inspect import fit_threshold

            fit_threshold(self, probe)
        self.tally = self._tallies[skill] = Tally()

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:
        self.tally = None

    def summary(self) -> Mapping[str, Any]:
        """What training held (running means), and what the last validation measured: ``..._eval``."""
        if self.warm:
            warn_of_unmet_budget(self)
        held = {"routing_utilization": float(self.held), "routing_threshold": float(self.threshold)}
        return {**(held if self.warm else {}), **held_out(self, self._tallies.values())}

    # -- evaluation -------------------------------------------------------------------------------------
    def set_routing(self, routing: str) -> None:
        """``on``, ``removed`` (full depth), ``shuffled`` (the gates permuted over tokens)."""
        known = get_args(LayerRoutingConfig.model_fields["eval_routing"].annotation)
        if routing not in known:
            raise ConfigError(f"routing {routing!r} is not one of {', '.join(known)}")
        self.routing = routing
