"""Two engines, one meaning: y = g F(x) + (1 - g) x for every token.

``masked`` runs F for every token and is the reference; its gradient for g is exact, <dL/dy, F(x) - x>, also where
g = 0. ``sparse`` does not run F where g = 0: whole rows are left out, and within a row keys and values are made
for all tokens while queries and MLP run for the open ones (with ``kv: drop | reuse`` for the open ones only). Without
a cache to fill, a row ends at its last open token: nobody looks further. A closed gate gets no gradient there.

With a patch P a closed unit leaves x + P(x): (1 - g) P(x) is added to either engine's y, for tokens with g < 1 only in
``sparse``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from headgate.methods.layer_routing.kv import Reuse
from headgate.methods.layer_routing.opened import BlockGates
from headgate.models.block_parts import BlockParts, Call, KeysValues, OpenTokens, uploaded
from headgate.models.private import checkpointed
from headgate.models.surgery import BlockOutput, hidden_of, with_hidden
from headgate.ops.layer_gates import gated

Forward = Callable[..., BlockOutput]


class RoutedBlock:
    """The replacement of one block's ``forward``.

    Args:
        block: the decoder block. original: its own forward.
        parts: its inside, or None for a family without one (then only ``masked`` with whole blocks works).
        gate: asked at every call: the gates of U units (1 block, or 2: attention, MLP), or None to run the block
            untouched.
        engine: asked at every call: ``masked`` or ``sparse``.
        keys: what ``kv`` makes of the call: the attention mask or the cache replaced; None changes nothing.
        drops: ``kv: drop``, closed tokens leave no keys and values.
        patches: one a unit, or none.
    """

    def __init__(
        self,
        block: nn.Module,
        original: Forward,
        parts: BlockParts | None,
        gate: Callable[[], BlockGates | None],
        engine: Callable[[], str],
        keys: Callable[[Call, Tensor], Call] | None = None,
        drops: bool = False,
        patches: Sequence[nn.Module] = (),
    ) -> None:
        self.block, self.original, self.parts = block, original, parts
        self.gate, self.engine, self.keys, self.drops = gate, engine, keys, drops
        self.patches = list(patches)  # in a list: they belong to the method, not to the model
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]

    def __call__(self, *args: object, **kwargs: object) -> BlockOutput:
        gates = self.gate()
        if gates is None or (gates.kind == "open" and not gates.learns and self.keys is None):
            return self.original(*args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden = given.pop("hidden_states")
        assert isinstance(hidden, Tensor)
        call: Call = given
        if self.keys is not None:
            call = self.keys(call, hidden)
            if gates.kind == "open" and not gates.learns:
                return self.original(hidden, **call)
        if gates.kind == "closed" and not self.patches and self.engine() == "sparse":
            assert self.parts is not None
            self.parts.write_cache(hidden, call, self._left(hidden, call))
            return hidden
        weight = gates.weight.to(hidden.dtype)
        if weight.shape[-1] == 2:
            return self._checkpointed(partial(self._by_unit, gates), hidden, weight, call)
        output = self._whole(gates, hidden, weight[..., 0], call)
        return with_hidden(output, self._patched(gates, 0, hidden_of(output), hidden, weight[..., :1]))

    def _whole(self, gates: BlockGates, hidden: Tensor, weight: Tensor, call: Call) -> BlockOutput:
        """g F(x) + (1 - g) x, one gate for the block."""
        sparse, kind = self.engine() == "sparse", gates.kind
        if kind == "closed" and sparse:
            assert self.parts is not None
            self.parts.write_cache(hidden, call, self._left(hidden, call))
            return hidden
        if not sparse or kind in ("open", "full"):
            output = self.original(hidden, **call)
            return with_hidden(output, gated(hidden, hidden_of(output), weight.unsqueeze(-1)))
        return self._sparse(gates, hidden, weight.expand(hidden.shape[:2]), call)

    def _patched(
        self, gates: BlockGates, unit: int, output: Tensor, hidden: Tensor, weight: Tensor
    ) -> Tensor:
        """``output`` + (1 - g) P(x) by a unit's patch; ``weight`` ``[B|1, T|1, 1]``."""
        if not self.patches:
            return output
        patch = self.patches[unit]
        if self.engine() == "masked" or weight.shape[1] == 1:
            return output + (1 - weight) * patch(hidden)
        weight = weight.expand(*hidden.shape[:2], 1)
        tokens = OpenTokens(~gates.ones[..., unit].expand(hidden.shape[:2]), hidden.device)
        if not len(tokens):
            return output
        left = (1 - tokens.take(weight)) * patch(tokens.take(hidden))
        return tokens.put(output, tokens.take(output) + left)

    def _left(self, hidden: Tensor, call: Call) -> KeysValues | None:
        """Keys and values that closed tokens leave; None: their own are made."""
        cache = call.get("past_key_values")
        if isinstance(cache, Reuse):
            return cache.below
        assert self.parts is not None
        return self.parts.nothing(hidden) if self.drops else None

    def _sparse(self, gates: BlockGates, hidden: Tensor, weight: Tensor, call: Call) -> Tensor:
        assert self.parts is not None
        hard = gates.hard
        if call.get("past_key_values") is not None:
            tokens = gates.tokens(0, hidden.shape[0], hidden.shape[1], hidden.device)
            return self._checkpointed(partial(self._tokens, tokens, hard), hidden, weight, call)
        opened = gates.open_tokens(0, *hidden.shape[:2])
        whole = opened.all(1)
        output = hidden
        if bool(whole.any()):
            (rows,) = uploaded([whole.nonzero()[:, 0]], hidden.device)
            ran = hidden_of(self.original(hidden[rows], **select(call, rows, hidden.shape[0])))
            output = output.index_copy(0, rows, gated(hidden[rows], ran, weight[rows].unsqueeze(-1)))
        partly = (opened.any(1) & ~whole).nonzero()[:, 0]
        if len(partly):
            end = int(opened[partly].any(0).nonzero().max()) + 1
            (rest,) = uploaded([partly], hidden.device)
            inside = crop(select(call, rest, hidden.shape[0]), end)
            run = partial(self._tokens, OpenTokens(opened[partly, :end], hidden.device), hard)
            ran = self._checkpointed(run, hidden[rest, :end], weight[rest, :end], inside)
            ran = torch.cat([ran, hidden[rest, end:]], 1)
            output = output.index_copy(0, rest, ran)
        return output

    def _tokens(self, tokens: OpenTokens, hard: bool, hidden: Tensor, weight: Tensor, call: Call) -> Tensor:
        """The open tokens of every row run; keys, values and the cache are those of all tokens."""
        assert self.parts is not None
        if not len(tokens):
            self.parts.write_cache(hidden, call, self._left(hidden, call))
            return hidden
        before = tokens.take(hidden)
        after = before + self.parts.open_attention(hidden, tokens, call, self._left(hidden, call))
        after = after + self.parts.mlp_branch(after)
        if not hard or weight.requires_grad:
            after = gated(before, after, tokens.take(weight).unsqueeze(-1))
        return tokens.put(hidden, after)

    def _by_unit(self, gates: BlockGates, hidden: Tensor, weight: Tensor, call: Call) -> Tensor:
        """x' = x + g_a A(x), y = x' + g_m M(x'): gates of their own for attention and MLP."""
        assert self.parts is not None
        weight = weight.expand(*hidden.shape[:2], 2)
        attention, mlp = weight[..., :1], weight[..., 1:]
        if self.engine() == "masked":
            middle = hidden + attention * self.parts.attention_branch(hidden, call)
            middle = self._patched(gates, 0, middle, hidden, attention)
            return self._patched(gates, 1, middle + mlp * self.parts.mlp_branch(middle), middle, mlp)
        rows, length = hidden.shape[:2]
        opened = [gates.tokens(unit, rows, length, hidden.device) for unit in (0, 1)]
        tokens, middle = opened[0], hidden
        if len(tokens):
            added = self.parts.open_attention(hidden, tokens, call, self._left(hidden, call))
            middle = tokens.put(hidden, tokens.take(hidden) + tokens.take(attention) * added)
        else:
            self.parts.write_cache(hidden, call, self._left(hidden, call))
        middle = self._patched(gates, 0, middle, hidden, attention)
        tokens, output = opened[1], middle
        if len(tokens):
            before = tokens.take(middle)
            output = tokens.put(middle, before + tokens.take(mlp) * self.parts.mlp_branch(before))
        return self._patched(gates, 1, output, middle, mlp)

    def _checkpointed(
        self, run: Callable[[Tensor, Tensor, Call], Tensor], hidden: Tensor, weight: Tensor, call: Call
    ) -> Tensor:
        """``run``, recomputed in the backward where the block's own forward would be."""
        block = self.block
        if getattr(block, "gradient_checkpointing", False) and block.training:
            cache = call.get("past_key_values")
            apart = {**call, "past_key_values": cache if isinstance(cache, Reuse) else None}
            return checkpointed(block, lambda h, w: run(h, w, apart), hidden, weight)
        return run(hidden, weight, call)


def select(call: Call, rows: Tensor, size: int) -> Call:
    """The arguments of some rows of the batch; what the rows share (first dimension 1) stays."""

    def of(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(of(item) for item in value)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == size and size > 1:
            return value[rows]
        return value

    return {name: of(value) for name, value in call.items()}


def crop(call: Call, end: int) -> Call:
    """The arguments of the first ``end`` tokens, where no cache lengthens the keys."""
    cropped = dict(call)
    if isinstance(mask := call.get("attention_mask"), Tensor):
        cropped["attention_mask"] = mask[:, :, :end, :end]
    if isinstance(positions := call.get("position_ids"), Tensor):
        cropped["position_ids"] = positions[:, :end]
    if (rotary := call.get("position_embeddings")) is not None:
        cropped["position_embeddings"] = tuple(part[:, :end] for part in rotary)
    return cropped
