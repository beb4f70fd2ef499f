"""What happens inside a forward: the route is decided once, and every routable block asks for its gates.

The wrapped backbone reads what the forward is about, runs the first pass where the router wants one, and lets the
cache carry what the next decoding step needs: a document's prefix, the gates of ``kv: drop``, the first pass's cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headgate.errors import ModelError
from headgate.methods.context import Context, remember
from headgate.methods.layer_routing.bookkeeping import Tally
from headgate.methods.layer_routing.engines import RoutedBlock
from headgate.methods.layer_routing.kv import OPENED, Opened, Reuse, opened_so_far, without_closed
from headgate.methods.layer_routing.policies import Route, Situation, decide, refuse_shuffled_decoding
from headgate.methods.prepass import PrepassCache, prepass
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.models.block_parts import ATTENTION_KINDS, BlockParts
from headgate.models.surgery import Handle, on_block_input, override_attribute, override_forward
from headgate.ops.depth import utilization
from headgate.ops.randomness import derive_seed, generator

if TYPE_CHECKING:
    from headgate.methods.layer_routing.config import LayerRoutingConfig
    from headgate.modules.layer_router import LayerRouter

PREPASS = "headgate_routing_prepass"
CHECKPOINTS = "_can_checkpoint_with_cache"
"""transformers takes a block's cache away under activation checkpointing, unless this says that it may keep it."""


class RoutedForward:
    """The part of LayerRouting that acts inside a forward."""

    config: LayerRoutingConfig
    router: LayerRouter | None
    handles: list[Handle]
    seed: int
    blocks: range
    units: int
    share: Tensor
    always: float
    threshold: Tensor
    fixed: Tensor
    routing: str
    engine: str
    suspended: bool
    route: Route | None
    tally: Tally | None
    _anatomy: Anatomy | None
    _step: Step | None
    _context: Context | None
    _opened: Tensor | None
    _cache: Any

    # -- installation ---------------------------------------------------------------------------------
    def _install(self, anatomy: Anatomy) -> None:
        config = self.config
        sparse = "sparse" in (self.engine, config.train_engine_for()) or self.units == 2
        parts = [BlockParts(anatomy, anatomy.blocks[b]) for b in self.blocks] if sparse else None
        self._check_kv(anatomy)
        self.handles.append(override_forward(anatomy.backbone, self._around_backbone))
        if config.features != "prepass":
            first = self.blocks.start if config.features == "block" else 0
            self.handles.append(on_block_input(anatomy.blocks[first], self._decide))
        for place in range(-1 if config.kv == "reuse" else 0, len(self.blocks)):
            block = anatomy.blocks[self.blocks.start + place]

            def make(
                original: Callable[..., Any], block: nn.Module = block, place: int = place
            ) -> Callable[..., Any]:
                return RoutedBlock(
                    block,
                    original,
                    parts[place] if parts and place >= 0 else None,
                    lambda: self._gate(place),
                    self._engine,
                    lambda call, hidden: self._keys(place, call, hidden),
                    drops=config.kv == "drop",
                )

            self.handles.append(override_forward(block, make))
            if config.kv == "reuse":
                self.handles.append(override_attribute(block, CHECKPOINTS, True))

    def _check_kv(self, anatomy: Anatomy) -> None:
        model: Any = anatomy.model
        kind, attention = model.config.get_text_config().model_type, model.config._attn_implementation
        if self.config.kv == "drop" and attention not in ATTENTION_KINDS:
            raise ModelError(
                f"kv: drop is an attention mask, which attn_implementation {attention!r} does not take: set "
                "model.attn_implementation: sdpa"
            )
        names = inspect.signature(type(anatomy.blocks[0]).forward).parameters
        if self.config.kv == "reuse" and "past_key_values" not in names:
            raise ModelError(f"no kv: reuse for architecture {kind!r}: use kv: drop or full")

    # -- the backbone ---------------------------------------------------------------------------------
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
            if self._idle:
                return original(*args, **kwargs)
            call = {**({"input_ids": args[0]} if args else {}), **kwargs}
            if self._in_training:
                kwargs["use_cache"] = False  # a cache that nobody reads would have every key and value made
            self._forget()
            self._context, self._cache = Context.read(call), call.get("past_key_values")
            refuse_shuffled_decoding(self._context, self.routing == "shuffled")
            first = self._read_first(partial(original, *args), kwargs)
            output = original(*args, **kwargs)
            self._after(getattr(output, "past_key_values", None), first)
            return output

        return forward

    def _forget(self) -> None:
        """What belongs to one forward."""
        self.route = self._context = self._opened = self._cache = None
        self._everyone: list[bool] = []
        self._reused: dict[int, Reuse] = {}

    def _read_first(self, backbone: Callable[..., Any], call: dict[str, Any]) -> PrepassCache | None:
        """With ``features: prepass``, the first forward and the decision that it allows."""
        if self.config.features != "prepass":
            return None
        assert self._anatomy is not None and self._context is not None
        self.suspended = True
        try:
            caches = call.get("use_cache") is not False
            hidden, kept = prepass(self._anatomy, backbone, call, self._context.past, PREPASS, caches=caches)
        finally:
            self.suspended = False
        self._decide(hidden)
        return kept

    def _after(self, cache: Any, first: PrepassCache | None) -> None:
        """What the next decoding step needs goes onto the cache; what only a backward needs goes."""
        route = self.route
        if cache is not None and route is not None:
            if route.memory is not None:
                remember(cache, route.memory)
            if self._opened is not None:
                remember(cache, Opened(self._opened), OPENED)
            if first is not None:
                remember(cache, first, PREPASS)
        self._cache = None
        if not self._in_training:
            self._reused = {}
            if self.tally is not None and route is not None:
                self.tally.add(route)

    # -- the route and its gates ------------------------------------------------------------------------
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
        if self._idle or self._context is None:
            return None
        if place < 0:  # the block whose keys and values the first routable one reuses
            return self.share.new_ones(1, 1, 1), "open"
        if self.route is None:
            return None
        first, last = place * self.units, (place + 1) * self.units
        return self.route.weight[..., first:last], self.route.kind(first, last)

    def _keys(self, place: int, call: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A block's call with the keys and values that ``kv`` leaves it; attention's gate decides."""
        if self.config.kv == "drop":
            return self._dropped(place, call, hidden)
        if self.config.kv == "reuse":
            return {**call, "past_key_values": self._reuse(place, call.get("past_key_values"), hidden)}
        return call

    def _dropped(self, place: int, call: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        assert self.route is not None and self._context is not None and self._anatomy is not None
        if self._opened is None:
            shape = hidden.shape[0], hidden.shape[1]
            self._opened = opened_so_far(self.route.weight, shape, self._cache, self._context.past)
            self._everyone = self._opened.flatten(0, 1).all(0).tolist()
        if self._everyone[place * self.units]:
            return call
        model: Any = self._anatomy.model
        boolean = model.config._attn_implementation == "sdpa"
        opened = self._opened[..., place * self.units]
        mask = without_closed(call.get("attention_mask"), opened, hidden, boolean=boolean)
        return {**call, "attention_mask": mask}

    def _reuse(self, place: int, cache: Any, hidden: Tensor) -> Reuse:
        if place < 0:
            found = Reuse(cache, None, None)
        else:
            assert self.route is not None
            first = place * self.units
            everyone = self.route.kind(first, first + 1) in ("open", "full")
            opened = (self.route.weight[..., first] != 0).expand(hidden.shape[:2])
            found = Reuse(cache, self._reused[place - 1].held, None if everyone else opened)
        self._reused[place] = found
        return found

    def temperature(self, step: Step | None) -> float:
        """tau = max(floor, tau_0 decay^epoch)."""
        c = self.config
        epoch = int(step.epoch) if step is not None else 0
        return max(c.temperature_floor, c.temperature * c.temperature_decay**epoch)

    def used(self, route: Route, weight: Tensor | None = None) -> Tensor:
        """Share of all blocks that the route opens on real tokens."""
        weight = (route.weight != 0).float() if weight is None else weight
        return utilization(weight, route.context.valid, self.share, self.always)
