"""What happens inside a forward: features once, outside the blocks; mixtures from them; deltas at the linears.

A hook inside a block runs again when the block is recomputed. It only reads what was set before the blocks ran, or
computes a pure function of it, so the recompute repeats the forward exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError, ModelError
from headgate.methods.context import Context, remember
from headgate.methods.lora_experts.features import MEMORY, keep_on_cache, router_features
from headgate.methods.lora_experts.routing import Phase, fixed_mixture, mix, mixture_of, phase_of
from headgate.methods.prepass import PrepassCache, prepass
from headgate.models.anatomy import Anatomy
from headgate.modules.arrow import ArrowRouter
from headgate.modules.expert_bank import Mixture

if TYPE_CHECKING:
    from headgate.methods.lora_experts.config import LoraExpertsConfig
    from headgate.methods.lora_experts.roster import Roster

PREPASS = "headgate_experts_prepass"
SHARED = "shared"
ONE, MIXTURE, ARROW = "expert:", "mixture:", "arrow"


@dataclass
class Pass:
    """One forward: what it is about, what the router read, and the mixtures made so far, by router."""

    context: Context
    phase: Phase | None
    features: Tensor | None = None
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    prepass: PrepassCache | None = None


class RoutedForward:
    """The part of LoraExperts that acts inside a forward."""

    config: LoraExpertsConfig
    roster: Roster
    routers: nn.ModuleDict
    current: int
    routing: str
    suspended: bool
    without: tuple[int, ...]
    evaluated: str | None
    running: Pass | None
    record: Pass | None
    recording: bool
    looking: list[Tensor] | None
    arrows: dict[str, ArrowRouter]
    _anatomy: Anatomy | None
    bank: Callable[[str], Any]
    router: Callable[..., Any]
    number_of: Callable[[int | str], int]

    @property
    def in_training(self) -> bool:
        assert self._anatomy is not None
        return self._anatomy.blocks[0].training

    @property
    def by_arrow(self) -> bool:
        """Whether every linear routes by itself, by its experts' weights (evaluation only)."""
        return self.routing == ARROW and not self.in_training and self.looking is None

    @property
    def idle(self) -> bool:
        return self.suspended or (self.routing == "removed" and not self.in_training)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, the experts contribute nothing: the model is its base, and whatever else is attached."""
        before, self.suspended = self.suspended, True
        try:
            yield
        finally:
            self.suspended = before

    @contextmanager
    def aside(self, without: tuple[int, ...] = ()) -> Iterator[None]:
        """Inside, other forwards may run (evaluation mode, some experts left out); the step's own pass comes back."""
        assert self._anatomy is not None
        training = [module for module in self._anatomy.model.modules() if module.training]
        kept = self.running, self.record, self.recording, self.without, self.routing
        self.recording, self.without = False, without
        try:
            self._anatomy.model.eval()
            yield
        finally:
            for module in training:
                module.training = True
            self.running, self.record, self.recording, self.without, self.routing = kept

    @torch.no_grad()
    def features_of(self, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        """``[M, F]``: what the router reads at every real token of some batches."""
        assert self._anatomy is not None
        self.looking = []
        try:
            with self.aside():
                for batch in batches:
                    given = ("input_ids", "attention_mask", "position_ids")
                    inputs = {k: batch[k] for k in given if batch.get(k) is not None}
                    self._anatomy.model(**inputs, use_cache=False)
            return torch.cat(self.looking)
        finally:
            self.looking = None

    # -- the backbone -----------------------------------------------------------------------------------
    def around_backbone(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.idle:
                return original(*args, **kwargs)
            call = {**({"input_ids": args[0]} if args else {}), **kwargs}
            self.running = None
            context = Context.read(call, MEMORY)
            weights = self._fixed()
            if self.by_arrow:
                self.running = Pass(context, None, features=context.valid)
            elif weights is not None:
                fixed = fixed_mixture(self.roster, weights, context.valid.device)
                self.running = Pass(context, None, mixtures={SHARED: fixed})
            else:
                phase = phase_of(self.config, self.roster, self.in_training, self.without)
                self.running = Pass(context, phase)
                self._read_first(call, original)
            running = self.running
            output = original(*args, **kwargs)
            if self.in_training:
                if self.recording and self.record is None and torch.is_grad_enabled():
                    self.record = running
            else:
                keep_on_cache(output, running.context)
                cache = getattr(output, "past_key_values", None)
                if cache is not None and running.prepass is not None:
                    remember(cache, running.prepass, PREPASS)
                self.running = None
            return output

        return forward

    def _fixed(self) -> dict[int, float] | None:
        """Gates that no router decides: asked for at evaluation, or the oracle's expert."""
        if not self.in_training and self.routing.startswith((ONE, MIXTURE)):
            return self.fixed_weights(self.routing)
        if self.config.router != "oracle" or self.without:
            return None
        served = self.roster.serving(self.evaluated) if self.evaluated and not self.in_training else None
        return {self.current if served is None else served: 1.0}

    def _read_first(self, call: dict[str, Any], backbone: Callable[..., Any]) -> None:
        """Features that exist before the first block."""
        assert self._anatomy is not None
        if not self.routers:
            self.read_features(torch.zeros(1, 1, 1, device=self.running.context.valid.device))  # type: ignore[union-attr]
        elif self.config.features == "embedding":
            embeds = call.get("inputs_embeds")
            self.read_features(self._anatomy.embedding(call["input_ids"]) if embeds is None else embeds)
        elif self.config.features == "prepass":
            self.read_features(self._read_ahead(call, backbone))

    def _read_ahead(self, call: dict[str, Any], backbone: Callable[..., Any]) -> Tensor:
        """Final hidden states with every adapter off; decoding continues a cache of its own."""
        assert self._anatomy is not None and self.running is not None
        caches = not self.in_training and call.get("use_cache") is not False
        past = self.running.context.past
        with self.bypassed():
            hidden, self.running.prepass = prepass(
                self._anatomy, backbone, call, past, PREPASS, caches=caches
            )
        return hidden

    def read_features(self, hidden: Tensor) -> None:
        """Take the router's features from a hidden state; a shared router decides here, once."""
        running = self.running
        if running is None or self.idle or running.mixtures:
            return
        if not self.routers:
            running.features = hidden
        else:
            running.features = router_features(
                hidden,
                running.context,
                prefix=self.config.prefix_tokens if self.config.granularity == "sequence" else None,
                pair=self.config.features == "embedding",
            )
            if self.looking is not None:
                self.looking.append(running.features[running.context.valid])
        if self.config.router_sites == SHARED or not self.routers:
            running.mixtures[SHARED] = self._mix(running, SHARED)

    def _mix(self, running: Pass, site: str) -> Mixture:
        assert running.phase is not None and running.features is not None
        router = self.router(site) if self.routers else None
        return mix(
            self.config,
            self.roster,
            running.phase,
            router,
            running.features,
            running.context.valid,
            capacity=self.in_training,
        )

    def mixtures_of(self, done: Pass) -> list[Mixture]:
        """The mixtures of a pass, with their graph: one, or one per site."""
        return list(done.mixtures.values()) or [self._mix(done, site) for site in self.routers]

    # -- the linears ------------------------------------------------------------------------------------
    def delta(self, site: str) -> Callable[[Tensor], Tensor | None]:
        """What the experts of a site add to its linear's output."""

        def of(x: Tensor) -> Tensor | None:
            if self.idle:
                return None
            running = self.running
            if running is None or (running.features is None and SHARED not in running.mixtures):
                raise ModelError(
                    f"lora_experts: {site} ran outside a forward of the model, so it has no gates: call the model itself"
                )
            mixture = running.mixtures.get(SHARED) or (
                self._arrow(site, x) if self.by_arrow else self._mix(running, site)
            )
            gates = mixture.scaled
            if gates.shape[1] > 1 and gates.shape[:2] != x.shape[:2]:
                raise ModelError(
                    f"lora_experts: {site} was given {list(x.shape[:2])} tokens and the gates are for "
                    f"{list(gates.shape[:2])}: a method that runs some tokens only cannot be used with it "
                    "(layer_routing: set its engine and train_engine to masked)"
                )
            change: Tensor = self.bank(site)(x, mixture)
            return change

        return of

    def _arrow(self, site: str, x: Tensor) -> Mixture:
        """Of every expert but a newborn, whose direction is chance."""
        numbers = phase_of(self.config, self.roster, False, self.without).numbers
        experts = [self.bank(site).expert(str(number)) for number in numbers]
        router = self.arrows.setdefault(site, ArrowRouter())
        gates = router(x, experts, self.config.top_k)
        return mixture_of(self.roster, numbers, gates, gates.weight)

    # -- evaluation -------------------------------------------------------------------------------------
    def set_routing(self, routing: str) -> None:
        """``on``, ``removed`` (the base), ``arrow`` (modules/arrow.py), ``expert:<number or skill>`` (that one alone,
        gate 1), or fixed gates, ``mixture:<number or skill>=<weight>,...``. Raises ConfigError for anything else."""
        if routing.startswith((ONE, MIXTURE)):
            self.fixed_weights(routing)
        elif routing not in ("on", "removed", ARROW):
            raise ConfigError(
                f"routing {routing!r} is not one of on, removed, arrow, expert:<number or skill>, "
                "mixture:<number or skill>=<weight>,..."
            )
        self.routing = routing

    def fixed_weights(self, routing: str) -> dict[int, float]:
        """The gates that a routing ``expert:`` or ``mixture:`` names, by expert number."""
        if routing.startswith(ONE):
            return {self.number_of(routing.removeprefix(ONE)): 1.0}
        found: dict[int, float] = {}
        for part in routing.removeprefix(MIXTURE).split(","):
            expert, _, weight = part.rpartition("=")
            try:
                value = float(weight)
            except ValueError:
                raise ConfigError(f"{routing!r}: {part!r} is not <number or skill>=<weight>") from None
            number = self.number_of(expert.strip())
            if number in found or not math.isfinite(value):
                raise ConfigError(f"{routing!r}: give expert {number} one finite weight")
            found[number] = value
        return found
