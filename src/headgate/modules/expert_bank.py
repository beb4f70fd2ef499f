"""ExpertBank: the LoRA experts of one linear layer, of any ranks, that come and go.

    y = W x + ((x A^T) * repeat(g * alpha / r, ranks)) B^T

Each expert keeps tensors of its own, because a live expert is Parameters and a frozen one is buffers: rows of one
stacked Parameter whose gradient is zeroed would still move, through AdamW's momentum and weight decay. Those tensors
are views of two matrices that hold all experts of the linear, so a forward without gradients reads the matrices as they
are: there is no copy that could be out of date, and no second one in memory. (A copy kept until a tensor's version
rises would be: fused optimizers write without raising it.)

Legend: B batch, T tokens, I inputs, O outputs, N experts taking part, r one expert's rank, R their sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

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
        """Twice the rank, the same function: A' = [A; random], B' = [B; 0].

        Equation: lora_experts (rank doubling): A' = [A; random], B' = [B, 0], alpha' = 2 alpha
        Proved by: tests/lora_experts/test_bank.py::test_a_wider_expert_is_the_same_function
        """
        more = LowRankExpert.fresh(self.down.shape[1], self.up.shape[1], self.rank, stream).to(self.down)
        return LowRankExpert(torch.cat([self.down, more.down]), torch.cat([self.up, more.up]))


class _Packed(NamedTuple):
    """All experts of a linear end to end: ``down`` [R, I], ``up`` [R, O], and the first row of each expert."""

    down: Tensor
    up: Tensor
    starts: tuple[int, ...]


class ExpertBank(nn.Module):
    """The experts of one linear layer by name; names are compared whole, never by a part of them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.experts = nn.ModuleDict()
        self._packed: _Packed | None = None
        self._members: dict[tuple[str, ...], list[LowRankExpert]] = {}

    def expert(self, name: str) -> LowRankExpert:
        expert = self.experts[name]
        assert isinstance(expert, LowRankExpert)
        return expert

    def add(self, name: str, expert: LowRankExpert) -> None:
        self.experts[name] = expert
        self._forget_packing()

    def remove(self, name: str) -> None:
        del self.experts[name]
        self._forget_packing()

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertBank:
        self._forget_packing()  # every tensor moves to another device or type on its own
        return super()._apply(fn, recurse)

    def _forget_packing(self) -> None:
        self._packed = None
        self._members.clear()

    def members(self, names: tuple[str, ...]) -> list[LowRankExpert]:
        """The named experts, in that order; the list is remembered, since every forward asks for the same one."""
        if names not in self._members:
            self._members = {names: [self.expert(name) for name in names]}
        return self._members[names]

    def _is_packed(self) -> bool:
        """Whether every expert still is the view that packing made of it; assigning ``.data`` ends that."""
        packed = self._packed
        if packed is None:
            return False
        experts = cast(Iterable[LowRankExpert], self.experts.values())
        down, up = packed.down.data_ptr(), packed.up.data_ptr()
        width, height = (
            self.in_features * packed.down.element_size(),
            self.out_features * packed.up.element_size(),
        )
        return all(
            e.down.data_ptr() == down + start * width and e.up.data_ptr() == up + start * height
            for e, start in zip(experts, packed.starts, strict=True)
        )

    @torch.no_grad()
    def _pack(self) -> _Packed:
        """Turn every expert's tensors into views of two common matrices; no value and no Parameter's identity changes."""
        with torch.inference_mode(False):  # an inference tensor could not be trained later
            experts = [self.expert(name) for name in self.experts]
            down_RI = torch.cat([e.down.detach() for e in experts])
            up_RO = torch.cat([e.up.detach() for e in experts])
            ranks = [e.rank for e in experts]
            starts = tuple(itertools.accumulate(ranks[:-1], initial=0))
            for expert, start, rank in zip(experts, starts, ranks, strict=True):
                expert.down.data = down_RI[start : start + rank]
                expert.up.data = up_RO[start : start + rank]
        self._packed = _Packed(down_RI, up_RO, starts)
        return self._packed

    def packed(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """``[R, I]`` and ``[R, O]`` of the named experts: the live values, without a copy where they lie in order."""
        members = self.members(names)
        if len(members) == 1:
            return members[0].down, members[0].up
        whole = self._packed if self._is_packed() else self._pack()
        assert whole is not None
        order = list(self.experts)
        first = order.index(names[0])
        if torch.is_grad_enabled() or order[first : first + len(names)] != list(names):
            return torch.cat([m.down for m in members]), torch.cat([m.up for m in members])
        start = whole.starts[first]
        rows = slice(start, start + sum(m.rank for m in members))
        return whole.down[rows], whole.up[rows]

    def forward(self, x_BTI: Tensor, mixture: Mixture) -> Tensor:
        """The experts' sum ``[B, T, O]``, to be added to the linear layer's own output."""
        members, chosen, device = self.members(mixture.experts), mixture.gates.chosen, x_BTI.device.type
        ranks = tuple(member.rank for member in members)
        if self._packed is None:
            self._pack()  # before any product: where factors lie must not depend on what ran before
        if chosen is not None and device == "cpu" and torch.is_grad_enabled():
            tokens, width = x_BTI.shape[:-1].numel(), self.in_features + self.out_features
            if grouped_is_faster(tokens, ranks, chosen.shape[-1], width):
                downs, ups = [m.down for m in members], [m.up for m in members]
                return grouped_experts(x_BTI, downs, ups, mixture.scaled, chosen)
        leading, few = x_BTI.shape[:-1], chosen is not None and not torch.is_grad_enabled()
        few = few and not torch.is_autocast_enabled(device)
        if few and device == "cpu" and leading.numel() == 1:
            taken = [(members[place], gate) for place, gate in mixture.of_one_token()]
            return one_token_low_rank(x_BTI, [(m.down, m.up, gate) for m, gate in taken])
        down_RI, up_RO = self.packed(mixture.experts)
        if few:
            assert chosen is not None
            if gathered_is_faster(leading.numel(), ranks, chosen.shape[-1]):
                if ranks not in mixture.rows:
                    mixture.rows[ranks] = chosen_rows(mixture.scaled, chosen, ranks, leading)
                return gathered_low_rank(x_BTI, down_RI, up_RO, mixture.rows[ranks])
        return low_rank_bank(x_BTI, down_RI, up_RO, mixture.scaled, ranks, chosen)
