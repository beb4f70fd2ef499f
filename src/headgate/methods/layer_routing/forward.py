"""What happens inside a forward: the route is decided once, and every routable block asks for its gates.

The wrapped backbone reads what the forward is about, runs the first pass where the router wants one, and lets the
cache carry what the next decoding step needs: a document's prefix, the gates of ``kv: drop``, the first pass's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from headgate.methods.context import PREPARED_MASKS, Context, padding_mask_alone, remember
from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.engines import Forward, RoutedBlock
from headgate.methods.layer_routing.kv import OPENED, Opened, Reuse, check_kv, opened_so_far, without_closed
from headgate.methods.layer_routing.opened import BlockGates, all_open
from headgate.methods.layer_routing.route import Route, fixed_route, refuse_shuffled_decoding, settled_route
from headgate.methods.prepass import PrepassCache, prepass
from headgate.methods.step import IGNORE_INDEX
from headgate.models.anatomy import Anatomy, BackboneOutput, Batch, model_inputs
from headgate.models.aside import look_aside
from headgate.models.block_parts import BlockParts, Call
from headgate.models.private import attention_implementation
from headgate.models.surgery import Handle, on_block_input, override_attribute, override_forward

if TYPE_CHECKING:
    from transformers import Cache

PREPASS = "headgate_routing_prepass"
CHECKPOINTS = "_can_checkpoint_with_cache"
"""transformers takes a block's cache away under activation checkpointing, unless this says that it may keep it."""


@dataclass
class Pass:
    """What belongs to one forward, and is kept for its backward: a checkpointed block is recomputed from it."""

    context: Context | None = None
    cache: Cache | None = None
    route: Route | None = None
    opened: Tensor | None = None
    everyone: list[bool] = field(default_factory=list)
    reused: dict[int, Reuse] = field(default_factory=dict)


class RoutedForward:
    """The hooks in a model, and what belongs to the forward that is running.

    Args:
        config: of the method.
        decide: the route of a forward, from what the router reads ``[B, T, H]``, its context, and whether it trains.
        observe: told every route at inference, once the forward is through.

    ``engine`` and ``routing`` are those of inference; ``now`` is the running forward, or the last. ``routing: observed``
    decides routes and carries them along while every block runs: how full depth verifies a routed draft.
    """

    def __init__(
        self,
        config: LayerRoutingConfig,
        decide: Callable[[Tensor, Context, bool], Route | None],
        observe: Callable[[Route], None],
    ) -> None:
        self.config, self.decide, self.observe = config, decide, observe
        self.engine: str = config.engine
        self.routing: str = config.eval_routing
        self.anatomy: Anatomy | None = None
        self._has_sparse = self.suspended = False
        self.mask: Tensor | None = None  # gates [G] that a search tries instead of what is decided
        self.forget()

    # -- installation ---------------------------------------------------------------------------------
    def install(self, anatomy: Anatomy, blocks: range, patches: Sequence[nn.Module]) -> Iterator[Handle]:
        """Handle by handle, so that what is in when a later part refuses can be taken out.

        ``patches``: one a gate, or none.
        """
        config, self.anatomy, units = self.config, anatomy, self.config.gates_per_block
        if config.policy == "dense":
            return
        self._has_sparse = "sparse" in (self.engine, config.train_engine_for()) or units == 2
        parts = [BlockParts(anatomy, anatomy.blocks[b]) for b in blocks] if self._has_sparse else None
        check_kv(config.kv, anatomy)
        yield override_forward(anatomy.backbone, self._around_backbone)
        yield override_attribute(anatomy.model, PREPARED_MASKS, padding_mask_alone)
        if config.features != "prepass":
            first = blocks.start if config.features == "block" else 0
            yield on_block_input(anatomy.blocks[first], self._read)
        for place in range(-1 if config.kv == "reuse" else 0, len(blocks)):
            block = anatomy.blocks[blocks.start + place]

            def make(original: Forward, block: nn.Module = block, place: int = place) -> Forward:
                return RoutedBlock(
                    block,
                    original,
                    parts[place] if parts and place >= 0 else None,
                    lambda: self._gate(place),
                    self._engine_now,
                    None if config.kv == "full" else lambda call, hidden: self._keys(place, call, hidden),
                    drops=config.kv == "drop",
                    patches=patches[place * units : (place + 1) * units] if place >= 0 else (),
                )

            yield override_forward(block, make)
            if config.kv == "reuse":
                yield override_attribute(block, CHECKPOINTS, True)

    def uninstall(self) -> None:
        """Once its handles are removed: nothing of the model is held any longer."""
        self.anatomy = None
        self.forget()

    def forget(self) -> None:
        """What the last forward left."""
        self.now = Pass()

    # -- the backbone ---------------------------------------------------------------------------------
    @property
    def in_training(self) -> bool:
        assert self.anatomy is not None
        return self.anatomy.blocks[0].training

    @property
    def _idle(self) -> bool:
        return self.suspended or (self.routing == "removed" and not self.in_training)

    def _engine_now(self) -> str:
        if self.now.context is not None and self.now.context.paged:
            return "masked"  # keys and values are written inside attention: a block that does not run leaves none
        return self.training_engine() if self.in_training else self.engine

    def training_engine(self) -> str:
        """Of the running forward: a mask that is held has no gate to learn, so what it closes need not run."""
        held = self.now.route is not None and self.now.route.logits is None and self._has_sparse
        return "sparse" if held and self.config.train_engine == "auto" else self.config.train_engine_for()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs at full depth and the current route is left alone."""
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False

    def routes(self, batches: Iterable[Batch]) -> Iterator[Route]:
        """What inference decides on batches, one after the other."""
        assert self.anatomy is not None, "attach the method first"
        model = self.anatomy.model
        with look_aside(model):
            for batch in batches:
                model(**model_inputs(batch, labels=False), use_cache=False)
                assert self.now.route is not None
                yield self.now.route

    @contextmanager
    def under(self, mask: Tensor | None) -> Iterator[None]:
        """Inside, inference runs a fixed mask ``[G]`` instead of what is decided; None changes nothing."""
        self.mask = mask
        try:
            yield
        finally:
            self.mask = None

    def loss(self, batches: Iterable[Batch], mask: Tensor | None = None) -> float:
        """Mean over labelled tokens at inference, under a fixed ``mask`` ``[G]`` or as decided."""
        assert self.anatomy is not None, "attach the method first"
        model, total, count = self.anatomy.model, 0.0, 0
        with self.under(mask), look_aside(model):
            for batch in batches:
                labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                total += float(model(**model_inputs(batch), use_cache=False).loss) * labelled
                count += labelled
        return total / max(count, 1)

    def _around_backbone(self, original: Callable[..., BackboneOutput]) -> Callable[..., BackboneOutput]:
        def forward(*args: object, **kwargs: object) -> BackboneOutput:
            if self._idle:
                return original(*args, **kwargs)
            call: Call = {**({"input_ids": args[0]} if args else {}), **kwargs}
            if self.in_training:
                kwargs["use_cache"] = False  # a cache that nobody reads would have every key and value made
            context = Context.read(call)
            refuse_shuffled_decoding(context, self.routing == "shuffled")
            if self.config.kv != "full":
                context.refuse_paged(f"kv: {self.config.kv}")
            self.now = Pass(context, call.get("past_key_values"))
            first = self._read_ahead(partial(original, *args), kwargs)
            output = original(*args, **kwargs)
            self._after(getattr(output, "past_key_values", None), first)
            return output

        return forward

    def release(self) -> None:
        """After the backward: keys and values that only a recompute would ask for."""
        self.now.reused = {}

    def _read_ahead(self, backbone: Callable[..., BackboneOutput], call: Call) -> PrepassCache | None:
        """With ``features: prepass``, the first forward and the decision that it allows."""
        if self.config.features != "prepass":
            return None
        assert self.anatomy is not None and self.now.context is not None
        with self.paused():
            caches = call.get("use_cache") is not False
            hidden, kept = prepass(
                self.anatomy, backbone, call, self.now.context.past, PREPASS, caches=caches
            )
        self._read(hidden)
        return kept

    def _read(self, hidden: Tensor) -> None:
        context = self.now.context
        if self._idle or context is None:
            return
        training = self.in_training
        if self.mask is not None and not training:
            self.now.route = fixed_route(self.mask.to(hidden.device), context)
            return
        kept = None if training else settled_route(context)
        self.now.route = kept if kept is not None else self.decide(hidden, context, training)

    def _after(self, cache: Cache | None, first: PrepassCache | None) -> None:
        """What the next decoding step needs goes onto the cache; what only a backward needs goes."""
        route = self.now.route
        if cache is not None and route is not None:
            if route.memory is not None:
                remember(cache, route.memory)
            if self.now.opened is not None:
                remember(cache, Opened(self.now.opened), OPENED)
            if first is not None:
                remember(cache, first, PREPASS)
        self.now.cache = None
        if not self.in_training:
            self.release()
            if route is not None:
                self.observe(route)

    # -- the gates of a block ---------------------------------------------------------------------------
    def _gate(self, place: int) -> BlockGates | None:
        if self._idle or self.now.context is None or self.routing == "observed":
            return None
        if place < 0:  # the block whose keys and values the first routable one reuses
            return all_open()
        if self.now.route is None:
            return None
        route, units = self.now.route, self.config.gates_per_block
        return route.on_host.of_block(place * units, (place + 1) * units)

    def _keys(self, place: int, call: Call, hidden: Tensor) -> Call:
        """A block's call with the keys and values that ``kv`` leaves it; attention's gate decides."""
        if self.config.kv == "drop":
            return self._dropped(place * self.config.gates_per_block, call, hidden)
        return {**call, "past_key_values": self._reuse(place, call.get("past_key_values"), hidden)}

    def _dropped(self, gate: int, call: Call, hidden: Tensor) -> Call:
        assert self.now.route is not None and self.now.context is not None and self.anatomy is not None
        if self.now.opened is None:
            shape = hidden.shape[0], hidden.shape[1]
            self.now.opened = opened_so_far(
                self.now.route.weight, shape, self.now.cache, self.now.context.past
            )
            known = self.now.opened if self.now.context.past else self.now.route.on_host.opened
            self.now.everyone = known.flatten(0, 1).all(0).tolist()
        if self.now.everyone[gate]:
            return call
        boolean = attention_implementation(self.anatomy.model.config) == "sdpa"
        mask = without_closed(call.get("attention_mask"), self.now.opened[..., gate], hidden, boolean=boolean)
        return {**call, "attention_mask": mask}

    def _reuse(self, place: int, cache: Cache | None, hidden: Tensor) -> Reuse:
        if place < 0:
            reuse = Reuse(cache, None, None)
        else:
            assert self.now.route is not None
            gate = place * self.config.gates_per_block
            everyone = self.now.route.on_host.kind(gate, gate + 1) in ("open", "full")
            opened = (self.now.route.weight[..., gate] != 0).expand(hidden.shape[:2])
            reuse = Reuse(cache, self.now.reused[place - 1].own, None if everyone else opened)
        self.now.reused[place] = reuse
        return reuse
