"""ExpertBank: the LoRA experts of one linear layer, of any ranks, that come and go.

    y = W x + ((x A^T) * repeat(g * alpha / r, ranks)) B^T

The factors of the experts that take part are concatenated in the forward. Each expert keeps tensors of its own,
because a live expert is Parameters and a frozen one is buffers: rows of one stacked Parameter whose gradient is
zeroed would still move, through AdamW's momentum and weight decay.

Legend: B batch, T tokens, I inputs, O outputs, N experts taking part, r one expert's rank, R their sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from headgate.ops.gathered_low_rank import (
    Rows,
    chosen_rows,
    gathered_is_faster,
    gathered_low_rank,
    one_token_low_rank,
)
from headgate.ops.gating import Gates
from headgate.ops.low_rank import grouped_experts, grouped_is_faster, low_rank_bank


@dataclass(frozen=True)
class Mixture:
    """Who takes part in a forward, and with what weight.

    ``experts``: names, in the order of the last dimension of ``gates``. ``probs``: the router's probabilities over
    them. ``scaled``: the gates times each expert's alpha / r. ``dropped``: share of dispatches over capacity.
    ``rows``, ``picked``: what the linears that share these gates need to know of them at decoding; filled in by use.
    """

    experts: tuple[str, ...]
    gates: Gates
    probs: Tensor
    scaled: Tensor
    dropped: Tensor | None = None
    rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)
    picked: list[tuple[int, float]] = field(default_factory=list)

    def of_one_token(self) -> list[tuple[int, float]]:
        """Place and scaled gate of each chosen expert; the gates are those of one token."""
        if not self.picked:
            assert self.gates.chosen is not None
            places, scaled = self.gates.chosen.flatten().tolist(), self.scaled.flatten().tolist()
            self.picked.extend((place, scaled[place]) for place in places)
        return self.picked


class LowRankExpert(nn.Module):
    """``down`` [r, I] and ``up`` [r, O]: PEFT's lora_A, and the transpose of its lora_B."""

    down: Tensor
    up: Tensor

    def __init__(self, down_rI: Tensor, up_rO: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down_rI), nn.Parameter(up_rO)

    @classmethod
    def fresh(
        cls, in_features: int, out_features: int, rank: int, stream: torch.Generator | None
    ) -> LowRankExpert:
        """LoRA's start: uniform A as in PEFT (Kaiming, a = sqrt 5), B = 0."""
        bound = 1 / math.sqrt(in_features)
        down_rI = (torch.rand(rank, in_features, generator=stream) * 2 - 1) * bound
        return cls(down_rI, torch.zeros(rank, out_features))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def frozen(self) -> bool:
        return not isinstance(self.down, nn.Parameter)

    def freeze(self, frozen: bool) -> None:
        """Turn parameters into buffers, or back; names and values stay."""
        if frozen == self.frozen:
            return
        for name in ("down", "up"):
            tensor: Tensor = getattr(self, name).detach()
            delattr(self, name)
            if frozen:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    @torch.no_grad()
    def widened(self, stream: torch.Generator | None) -> LowRankExpert:
        """Twice the rank, the same function: A' = [A; random], B' = [B; 0]."""
        more = LowRankExpert.fresh(self.down.shape[1], self.up.shape[1], self.rank, stream).to(self.down)
        return LowRankExpert(torch.cat([self.down, more.down]), torch.cat([self.up, more.up]))


_version = attrgetter("_version")


@dataclass
class _Cast:
    """The experts of one mixture, and their factors as they were last packed; looked up on every forward."""

    members: list[LowRankExpert]
    ranks: tuple[int, ...]
    seen: list[Tensor]
    versions: list[int]
    packed: tuple[Tensor, Tensor] | None = None


class ExpertBank(nn.Module):
    """The experts of one linear layer by name; names are compared whole, never by a part of them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.experts = nn.ModuleDict()
        self._casts: dict[tuple[str, ...], _Cast] = {}

    def expert(self, name: str) -> LowRankExpert:
        found = self.experts[name]
        assert isinstance(found, LowRankExpert)
        return found

    def add(self, name: str, expert: LowRankExpert) -> None:
        self.experts[name] = expert
        self._casts.clear()

    def remove(self, name: str) -> None:
        del self.experts[name]
        self._casts.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertBank:
        self._casts.clear()  # tensors move to another device or type
        return super()._apply(fn, recurse)

    def _cast(self, names: tuple[str, ...]) -> _Cast:
        cast = self._casts.get(names)
        if cast is None:
            members = [self.expert(name) for name in names]
            cast = _Cast(members, tuple(member.rank for member in members), [], [])
            self._casts = {names: cast}
        return cast

    def packed(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """``[R, I]`` and ``[R, O]`` of the named experts; kept from call to call where no gradient is wanted.

        What is kept is made anew when a factor's version says that it was written to.
        """
        cast = self._cast(names)
        if len(names) == 1:
            return cast.members[0].down, cast.members[0].up
        if torch.is_grad_enabled():
            return torch.cat([m.down for m in cast.members]), torch.cat([m.up for m in cast.members])
        if cast.packed is None or list(map(_version, cast.seen)) != cast.versions:
            downs, ups = [m.down for m in cast.members], [m.up for m in cast.members]
            cast.packed = torch.cat(downs), torch.cat(ups)
            cast.seen = downs + ups
            cast.versions = list(map(_version, cast.seen))
        return cast.packed

    def forward(self, x_BTI: Tensor, mixture: Mixture) -> Tensor:
        """The experts' sum ``[B, T, O]``, to be added to the linear layer's own output."""
        cast, chosen, device = self._cast(mixture.experts), mixture.gates.chosen, x_BTI.device.type
        if chosen is not None and device == "cpu" and torch.is_grad_enabled():
            tokens, width = x_BTI.shape[:-1].numel(), self.in_features + self.out_features
            if grouped_is_faster(tokens, cast.ranks, chosen.shape[-1], width):
                downs, ups = [m.down for m in cast.members], [m.up for m in cast.members]
                return grouped_experts(x_BTI, downs, ups, mixture.scaled, chosen)
        leading, few = x_BTI.shape[:-1], chosen is not None and not torch.is_grad_enabled()
        few = few and not torch.is_autocast_enabled(device)
        if few and device == "cpu" and leading.numel() == 1:
            taken = [(cast.members[place], gate) for place, gate in mixture.of_one_token()]
            return one_token_low_rank(x_BTI, [(m.down, m.up, gate) for m, gate in taken])
        down_RI, up_RO = self.packed(mixture.experts)
        if few:
            assert chosen is not None
            if gathered_is_faster(leading.numel(), cast.ranks, chosen.shape[-1]):
                if cast.ranks not in mixture.rows:
                    mixture.rows[cast.ranks] = chosen_rows(mixture.scaled, chosen, cast.ranks, leading)
                return gathered_low_rank(x_BTI, down_RI, up_RO, mixture.rows[cast.ranks])
        return low_rank_bank(x_BTI, down_RI, up_RO, mixture.scaled, cast.ranks, chosen)
