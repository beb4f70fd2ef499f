"""LayerRouting as a Method: who decides, what it costs, what it is taught, and what a run keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError, ModelError
from headgate.methods.base import Method, build_config
from headgate.methods.layer_routing.bookkeeping import follow, telemetry, worth
from headgate.methods.layer_routing.config import LEARNED, LayerRoutingConfig
from headgate.methods.layer_routing.context import Context, remember
from headgate.methods.layer_routing.engines import RoutedBlock
from headgate.methods.layer_routing.policies import (
    Route,
    Situation,
    decide,
    refuse_shuffled_decoding,
)
from headgate.methods.layer_routing.teaching import auxiliary_losses
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.models.block_parts import BlockParts, is_tuner
from headgate.models.surgery import on_block_input, override_forward
from headgate.modules.layer_router import LayerRouter
from headgate.ops.depth import utilization
from headgate.ops.layer_gates import drop_rates
from headgate.ops.randomness import derive_seed, generator

ROUTER = "layer_router"


class LayerRouting(Method):
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
        self.route: Route | None = None
        self._context: Context | None = None
        self._anatomy: Anatomy | None = None
        self._step: Step | None = None
        self.suspended = False
        for name in ("threshold", "dual", "baseline", "held"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("warm", torch.zeros((), dtype=torch.long))
        self.threshold: Tensor
        self.dual: Tensor
        self.baseline: Tensor
        self.held: Tensor
        self.warm: Tensor
        self.fixed: Tensor

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
        config = self.config
        sparse = "sparse" in (self.engine, config.train_engine_for()) or self.units == 2
        parts = [BlockParts(anatomy, anatomy.blocks[b]) for b in self.blocks] if sparse else None
        self._anatomy = anatomy
        self.share, self.always, self.kv_share = worth(anatomy, self.blocks, self.units)
        if config.policy == "dense":
            return
        self.handles.append(override_forward(anatomy.backbone, self._around_backbone))
        first = self.blocks.start if config.features == "block" else 0
        self.handles.append(on_block_input(anatomy.blocks[first], self._decide))
        for place, number in enumerate(self.blocks):
            block = anatomy.blocks[number]

            def make(
                original: Callable[..., Any], block: nn.Module = block, place: int = place
            ) -> Callable[..., Any]:
                inside = parts[place] if parts else None
                return RoutedBlock(block, original, inside, lambda: self._gate(place), self._engine)

            self.handles.append(override_forward(block, make))

    def detach(self) -> None:
        super().detach()
        self.route = self._context = self._anatomy = None

    @property
    def attached(self) -> bool:
        return self._anatomy is not None

    def claims(self) -> Sequence[str]:
        return ("routes_blocks",)

    # -- inside a forward -------------------------------------------------------------------------------
    @property
    def _in_training(self) -> bool:
        assert self._anatomy is not None
        return self._anatomy.blocks[0].training

    @property
    def _idle(self) -> bool:
        return self.suspended or (self.routing == "removed" and not self._in_training)

    def _engine(self) -> str:
        engine: str = self.config.train_engine_for() if self._in_training else self.engine
        return engine

    def _around_backbone(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = {**({"input_ids": args[0]} if args else {}), **kwargs}
            if self._idle:
                return original(*args, **kwargs)
            if self._in_training:
                kwargs["use_cache"] = False  # a cache that nobody reads would have every key and value made
            self.route, self._context = None, Context.read(call)
            refuse_shuffled_decoding(self._context, self.routing == "shuffled")
            output = original(*args, **kwargs)
            cache = getattr(output, "past_key_values", None)
            if cache is not None and self.route is not None and self.route.memory is not None:
                remember(cache, self.route.memory)
            return output

        return forward

    def _decide(self, hidden: Tensor) -> None:
        if self._idle or self._context is None:
            return
        step, training = self._step if self._in_training else None, self._in_training
        purpose = "layer_routing"
        now = Situation(
            training=training,
            temperature=self.temperature(step),
            threshold=self.threshold,
            salt=derive_seed(self.seed, step.micro_step if step else 0, purpose),
            streams=step.generator(purpose) if step else generator(self.seed, 0, purpose),
            shuffled=self.routing == "shuffled",
            units=self.units,
            share=(self.config.target_utilization - self.always) / max(1 - self.always, 1e-9),
            fixed=self.fixed,
        )
        self.route = decide(self.config, self.router, hidden, self._context, now)

    def _gate(self, place: int) -> tuple[Tensor, str] | None:
        if self.route is None or self._idle:
            return None
        first, last = place * self.units, (place + 1) * self.units
        return self.route.weight[..., first:last], self.route.kind(first, last)

    def temperature(self, step: Step | None) -> float:
        """tau = max(floor, tau_0 decay^epoch)."""
        c = self.config
        epoch = int(step.epoch) if step is not None else 0
        return max(c.temperature_floor, c.temperature * c.temperature_decay**epoch)

    def used(self, route: Route, weight: Tensor | None = None) -> Tensor:
        """Share of all blocks that the route opens on real tokens."""
        weight = (route.weight != 0).float() if weight is None else weight
        return utilization(weight, route.context.valid, self.share, self.always)

    # -- what is trained, what is saved -------------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {ROUTER: list(self.router.parameters())} if self.router is not None else {}

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        return {ROUTER: self.config.router_lr} if self.config.policy in LEARNED else {}

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "hidden_size": self.hidden_size, "num_blocks": self.num_blocks}

    @classmethod
    def from_structure(cls, structure: Mapping[str, Any]) -> LayerRouting:
        method = cls(build_config(cls.Config, structure["config"]))
        method._build(structure["hidden_size"], structure["num_blocks"])
        return method

    # -- training ---------------------------------------------------------------------------------------
    def check_run(self, max_steps: int) -> None:
        """A teacher needs an adapter to switch off."""
        anatomy = self._anatomy
        if self.config.kd and anatomy is not None and not any(map(is_tuner, anatomy.model.modules())):
            raise ConfigError(
                "layer_routing: kd distils from the model with its adapter off, and this model has no adapter: "
                "set lora, or methods.layer_routing.kd: false"
            )

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
        if self.route is None or self.config.train_engine_for() == "masked":
            return 1.0
        used = self.used(self.route)
        return used + (1 - used) * self.kv_share if self.config.routes_per == "token" else used

    @torch.no_grad()
    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """Dual variable, threshold and baseline follow the accepted batches, the same on every rank."""
        route, self._step = self.route, None
        if route is None or not step.accepted:
            return {}
        used = follow(self, route, step)
        return telemetry(self, route, step, used) if step.should_log else {}

    def summary(self) -> Mapping[str, Any]:
        if not self.warm:
            return {}
        return {"routing_utilization": float(self.held), "routing_threshold": float(self.threshold)}

    # -- evaluation -------------------------------------------------------------------------------------
    def set_routing(self, routing: str) -> None:
        """``on``, ``removed`` (full depth), ``shuffled`` (the gates permuted over tokens)."""
        known = get_args(LayerRoutingConfig.model_fields["eval_routing"].annotation)
        if routing not in known:
            raise ConfigError(f"routing {routing!r} is not one of {', '.join(known)}")
        self.routing = routing
