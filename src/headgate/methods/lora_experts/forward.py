"""What happens inside a forward: features once, outside the blocks; mixtures from them; deltas at the linears.

A hook inside a block runs again when the block is recomputed. It only reads what was set before the blocks ran, or
computes a pure function of it, so the recompute repeats the forward exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from headgate.errors import ModelError
from headgate.methods.context import PREPARED_MASKS, Context, padding_mask_alone, remember
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.lora_experts.features import MEMORY, keep_on_cache, router_features, text_evidence
from headgate.methods.lora_experts.readings import Readings
from headgate.methods.lora_experts.routers import SHARED
from headgate.methods.lora_experts.routes import ARROW, ONE, REMOVED, check_route, fixed_weights, is_fixed
from headgate.methods.lora_experts.routing import Phase, fixed_mixture, mix, mixture_of, phase_of
from headgate.methods.prepass import PrepassCache, prepass
from headgate.methods.step import IGNORE_INDEX, real_tokens
from headgate.models.anatomy import Anatomy, BackboneOutput, Batch, model_inputs
from headgate.models.aside import look_aside
from headgate.models.block_parts import Call
from headgate.models.surgery import Handle, on_block_input, on_linear, override_attribute, override_forward
from headgate.modules.arrow import ArrowRouter
from headgate.modules.bayes_router import BayesRouter
from headgate.modules.expert_bank import Mixture

PREPASS = "headgate_experts_prepass"


@dataclass
class Pass:
    """One forward: what it is about, what the router read, and the mixtures made so far, by router."""

    context: Context
    phase: Phase | None
    features: Tensor | None = None
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    prepass: PrepassCache | None = None


class RoutedForward:
    """The experts at work in a model. It has no state that outlives a run of forwards, apart from ``route``.

    ``route``: what an evaluation is routed by (routes.py). ``evaluated``: the skill whose rows come, which only the
    oracle reads. ``record``: the first training forward of a micro-batch since ``start_recording``. ``readings``: what was
    read besides.
    """

    def __init__(self, config: LoraExpertsConfig, experts: ExpertSet) -> None:
        self.config, self.experts = config, experts
        self.route, self.evaluated = config.eval_routing, ""
        self.running: Pass | None = None
        self.record: Pass | None = None
        self.arrows: dict[str, ArrowRouter] = {}
        self.readings = Readings()
        self._anatomy: Anatomy | None = None
        self._suspended, self._recording = False, False
        self._without: tuple[int, ...] = ()
        self._features: list[Tensor] | None = None

    # -- installation -----------------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy, linears: Mapping[str, nn.Module]) -> list[Handle]:
        """Hook the backbone, the block whose input is read, and every linear with experts."""
        self._anatomy = anatomy
        handles = [
            override_forward(anatomy.backbone, self.around_backbone),
            override_attribute(anatomy.model, PREPARED_MASKS, padding_mask_alone),
        ]
        if self.config.features.startswith("block"):
            handles.append(on_block_input(anatomy.blocks[self.config.first_block], self.read_features))
        return handles + [on_linear(linear, self.delta(site)) for site, linear in linears.items()]

    def detach(self) -> None:
        self.running = self.record = self._anatomy = None

    @property
    def anatomy(self) -> Anatomy:
        assert self._anatomy is not None, "lora_experts is not attached"
        return self._anatomy

    # -- what a forward is for --------------------------------------------------------------------------
    @property
    def in_training(self) -> bool:
        return bool(self.anatomy.blocks[0].training)

    @property
    def by_arrow(self) -> bool:
        """Whether every linear routes by itself, by its experts' weights (evaluation only)."""
        return self.route == ARROW and not self.in_training and self._features is None

    @property
    def idle(self) -> bool:
        return self._suspended or (self.route == REMOVED and not self.in_training)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, the experts contribute nothing: the model is its base, and whatever else is attached."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    @contextmanager
    def aside(self, without: tuple[int, ...] = ()) -> Iterator[None]:
        """Inside, other forwards may run (some experts left out); the step's own pass comes back. See ``look_aside``."""
        kept = self.running, self.record, self._recording, self._without, self.route
        self._recording, self._without = False, without
        try:
            with look_aside(self.anatomy.model):
                yield
        finally:
            self.running, self.record, self._recording, self._without, self.route = kept

    def set_route(self, route: str) -> None:
        """What evaluations are routed by from now on; see routes.py. Raises ConfigError for what there is not."""
        check_route(route, self.experts)
        self.route = route

    def start_recording(self) -> None:
        self.record, self._recording = None, True

    def take_record(self) -> Pass | None:
        """The training forward of this micro-batch, whose graph must not live on."""
        record, self.record, self._recording = self.record, None, False
        return record

    def features_of(self, batches: Iterable[Batch]) -> Tensor:
        """``[M, F]``: what the router reads at every real token of some batches."""
        self._features = []
        try:
            with self.aside():
                for batch in batches:
                    self.anatomy.model(**model_inputs(batch, labels=False), use_cache=False)
                    self.readings.note(real_tokens(batch).sum(-1))
            return torch.cat(self._features)
        finally:
            self._features = None

    def loss_alone(self, number: int | None, batches: Iterable[Batch]) -> float:
        """Task loss of one expert alone, gate 1, over all trained tokens of some batches; None: of the base without any."""
        total = count = 0.0
        with self.aside():
            self.route = REMOVED if number is None else f"{ONE}{number}"
            for batch in batches:
                tokens = float(batch["labels"][..., 1:].ne(IGNORE_INDEX).sum())
                loss = self.anatomy.model(**model_inputs(batch), use_cache=False).loss
                total, count = total + float(loss) * tokens, count + tokens
                self.readings.note(real_tokens(batch).sum(-1))
        return total / max(count, 1.0)

    # -- the backbone -----------------------------------------------------------------------------------
    def around_backbone(self, original: Callable[..., BackboneOutput]) -> Callable[..., BackboneOutput]:
        def forward(*args: object, **kwargs: object) -> BackboneOutput:
            if self.idle:
                return original(*args, **kwargs)
            call: Call = {**({"input_ids": args[0]} if args else {}), **kwargs}
            self.running = None
            context = Context.read(call, MEMORY)
            weights = self._fixed()
            if self.by_arrow:
                self.running = Pass(context, None, features=context.valid)
            elif weights is not None:
                fixed = fixed_mixture(self.experts.roster, weights, context.valid.device)
                self.running = Pass(context, None, mixtures={SHARED: fixed})
            else:
                phase = phase_of(self.config, self.experts.roster, self.in_training, self._without)
                self.running = Pass(context, phase)
                self._read_first(call, original)
            running = self.running
            output = original(*args, **kwargs)
            if self.in_training:
                if self._recording and self.record is None and torch.is_grad_enabled():
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
        if not self.in_training and is_fixed(self.route):
            return fixed_weights(self.route, self.experts)
        if self.config.router != "oracle" or self._without:
            return None
        known = None if self.in_training else self.experts.roster.serving(self.evaluated)
        return {self.experts.current if known is None else known: 1.0}

    def _read_first(self, call: Call, backbone: Callable[..., BackboneOutput]) -> None:
        """Features that exist before the first block."""
        assert self.running is not None
        router = self.experts.routers.closed_form
        if isinstance(router, BayesRouter):
            context, vocabulary = self.running.context, self.anatomy.vocab_size
            self._decide(text_evidence(router, context, vocabulary, prefix=self._prefix))
        elif not self.experts.routers:
            self._decide(torch.zeros(1, 1, 1, device=self.running.context.valid.device))
        elif self.config.features == "embedding":
            embeds = call.get("inputs_embeds")
            self.read_features(self.anatomy.embedding(call["input_ids"]) if embeds is None else embeds)
        elif self.config.features == "prepass":
            self.read_features(self._read_ahead(call, backbone))

    def _read_ahead(self, call: Call, backbone: Callable[..., BackboneOutput]) -> Tensor:
        """Final hidden states with every adapter off; decoding continues a cache of its own."""
        assert self.running is not None
        caches = not self.in_training and call.get("use_cache") is not False
        past = self.running.context.past
        with self.bypassed():
            hidden, self.running.prepass = prepass(self.anatomy, backbone, call, past, PREPASS, caches=caches)
        return hidden

    @property
    def _prefix(self) -> int | None:
        """Tokens of a document that its gates are fixed by; None: every token moves them."""
        return self.config.prefix_tokens if self.config.granularity == "sequence" else None

    def read_features(self, hidden: Tensor) -> None:
        """Take the router's features from a hidden state; a shared router decides here, once."""
        running = self.running
        if running is None or self.idle or running.mixtures or running.phase is None:  # no router is asked
            return
        pair = self.config.features == "embedding"
        features = router_features(hidden, running.context, prefix=self._prefix, pair=pair)
        if self._features is not None:
            self._features.append(features[running.context.valid])
        self._decide(features)

    def _decide(self, features: Tensor) -> None:
        """What a forward's routers read is there; one that all linears share gives its gates now."""
        assert self.running is not None
        self.running.features = features
        if self.config.router_sites == SHARED or not self.experts.routers:
            self.running.mixtures[SHARED] = self._mix(self.running, SHARED)

    def _mix(self, running: Pass, site: str) -> Mixture:
        assert running.phase is not None and running.features is not None
        router = self.experts.routers.at(site) if self.experts.routers else None
        return mix(
            self.config,
            self.experts.roster,
            running.phase,
            router,
            running.features,
            running.context.valid,
            capacity=self.in_training,
        )

    def mixtures_of(self, done: Pass) -> list[Mixture]:
        """The mixtures of a pass, with their graph: one, or one per site."""
        return list(done.mixtures.values()) or [self._mix(done, site) for site in self.experts.routers]

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
            change: Tensor = self.experts.bank(site)(x, mixture)
            return change

        return of

    def _arrow(self, site: str, x: Tensor) -> Mixture:
        """Of every expert but a newborn, whose direction is chance."""
        numbers = phase_of(self.config, self.experts.roster, False, self._without).numbers
        experts = [self.experts.bank(site).expert(str(number)) for number in numbers]
        router = self.arrows.setdefault(site, ArrowRouter())
        gates = router(x, experts, self.config.top_k)
        return mixture_of(self.experts.roster, numbers, gates, gates.weight)
