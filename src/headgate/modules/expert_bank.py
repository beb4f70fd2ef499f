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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from headgate.modules.low_rank_expert import LowRankExpert
from headgate.ops.gathered_low_rank import (
    Rows,
    chosen_rows,
    gathered_is_faster,
    gathered_low_rank,
    one_token_low_rank,
)
from headgate.ops.gating import Gates
from headgate.ops.grouped_low_rank import (
    Factors,
    Grouping,
    group_by_expert,
    grouped_experts,
    grouped_is_faster,
)
from headgate.ops.low_rank import low_rank_bank


@dataclass(frozen=True)
class Mixture:
    """Who takes part in a forward, and with what weight.

    ``experts``: names, in the order of the last dimension of ``gates``. ``probs``: the router's probabilities over
    them. ``scaled``: the gates times each expert's alpha / r. ``paid``: those of the chosen experts alone (``gates.chosen``).
    ``dropped``: share of dispatches over capacity.
    ``rows``, ``picked``, ``grouped``: what the linears that share these gates need to know of them; filled in by use.
    """

    experts: tuple[str, ...]
    gates: Gates
    probs: Tensor
    scaled: Tensor
    paid: Tensor | None = None
    dropped: Tensor | None = None
    rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)
    picked: list[tuple[int, float]] = field(default_factory=list)
    grouped: dict[torch.Size, Grouping] = field(default_factory=dict)

    def of_one_token(self) -> list[tuple[int, float]]:
        """Place and scaled gate of each chosen expert; the gates are those of one token."""
        if not self.picked:
            assert self.gates.chosen is not None
            places, scaled = self.gates.chosen.flatten().tolist(), self.scaled.flatten().tolist()
            self.picked.extend((place, scaled[place]) for place in places)
        return self.picked

    def grouping(self, leading: torch.Size) -> Grouping:
        """The tokens of inputs ``[*leading, I]`` by expert; ``gates.chosen`` says who serves them."""
        if leading not in self.grouped:
            assert self.gates.chosen is not None
            k = self.gates.chosen.shape[-1]
            chosen_MK = self.gates.chosen.expand(*leading, k).reshape(-1, k)
            self.grouped[leading] = group_by_expert(chosen_MK, len(self.experts))
        return self.grouped[leading]


class _Factors(Sequence[Factors]):
    """The factors of experts, read off when they are asked for: of a thousand, a forward wants few."""

    def __init__(self, members: Sequence[LowRankExpert]) -> None:
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, place: Any) -> Any:
        member = self._members[place]
        return member.down, member.up


SPARE = 16
"""Room that packing leaves for births: one row in so many. Copying a thousand experts for the sake of one is what a birth
would cost otherwise."""


class _Packed(NamedTuple):
    """All experts of a linear end to end: ``down`` [R, I], ``up`` [R, O], and the first row of each expert. The rows after
    the last expert's are spare."""

    down: Tensor
    up: Tensor
    starts: tuple[int, ...]


class _Asked(NamedTuple):
    """Experts by name as a forward wants them; ``first``: the place where they lie one after another, or None."""

    names: tuple[str, ...]
    members: list[LowRankExpert]
    ranks: tuple[int, ...]
    first: int | None


class ExpertBank(nn.Module):
    """The experts of one linear layer by name; names are compared whole, never by a part of them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.experts = nn.ModuleDict()
        self._packed: _Packed | None = None
        self._asked: _Asked | None = None

    def expert(self, name: str) -> LowRankExpert:
        expert = self.experts[name]
        assert isinstance(expert, LowRankExpert)
        return expert

    def add(self, name: str, expert: LowRankExpert) -> None:
        """An expert under a new name goes behind the others, into spare rows while there are some."""
        packed = self._packed if name not in self.experts else None
        self._forget_packing()
        self.experts[name] = expert
        if (
            packed is None
            or packed.down.device != expert.down.device
            or packed.down.dtype != expert.down.dtype
        ):
            return
        before = list(self.experts.values())[-2]
        assert isinstance(before, LowRankExpert)
        start = packed.starts[-1] + before.rank
        if start + expert.rank <= len(packed.down):
            self._place(expert, packed.down, packed.up, start)
            self._packed = packed._replace(starts=(*packed.starts, start))

    def remove(self, name: str) -> None:
        """The last one leaves its rows to the next birth; without another the rest is packed anew."""
        packed, last = self._packed, name == list(self.experts)[-1]
        self._forget_packing()
        del self.experts[name]
        if packed is not None and last and len(self.experts):
            self._packed = packed._replace(starts=packed.starts[:-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertBank:
        self._forget_packing()  # every tensor moves to another device or type on its own
        return super()._apply(fn, recurse)

    def _forget_packing(self) -> None:
        self._packed = self._asked = None

    def _asked_for(self, names: tuple[str, ...]) -> _Asked:
        """Remembered, since every forward asks for the same ones; equal tuples compare at once where they are one object."""
        if self._asked is None or self._asked.names != names:
            members = [self.expert(name) for name in names]
            places = {name: place for place, name in enumerate(self.experts)}
            first = places[names[0]]
            in_order = all(places[name] == first + step for step, name in enumerate(names))
            self._asked = _Asked(names, members, tuple(m.rank for m in members), first if in_order else None)
        return self._asked

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
            starts = tuple(itertools.accumulate((e.rank for e in experts[:-1]), initial=0))
            total = starts[-1] + experts[-1].rank
            rows = total + total // SPARE
            down_RI = experts[0].down.new_empty(rows, self.in_features)
            up_RO = experts[0].up.new_empty(rows, self.out_features)
            for expert, start in zip(experts, starts, strict=True):
                self._place(expert, down_RI, up_RO, start)
        self._packed = _Packed(down_RI, up_RO, starts)
        return self._packed

    @staticmethod
    @torch.no_grad()
    def _place(expert: LowRankExpert, down_RI: Tensor, up_RO: Tensor, start: int) -> None:
        """The expert's tensors become these rows, with its values."""
        for tensor, whole in ((expert.down, down_RI), (expert.up, up_RO)):
            rows = whole[start : start + expert.rank]
            rows.copy_(tensor)
            tensor.data = rows

    def packed(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """``[R, I]`` and ``[R, O]`` of the named experts: the live values, without a copy where they lie in order."""
        _, members, ranks, first = self._asked_for(names)
        if len(members) == 1:
            return members[0].down, members[0].up
        whole = self._packed if self._is_packed() else self._pack()
        assert whole is not None
        if torch.is_grad_enabled() or first is None:
            return torch.cat([m.down for m in members]), torch.cat([m.up for m in members])
        rows = slice(whole.starts[first], whole.starts[first] + sum(ranks))
        return whole.down[rows], whole.up[rows]

    def forward(self, x_BTI: Tensor, mixture: Mixture) -> Tensor:
        """The experts' sum ``[B, T, O]``, to be added to the linear layer's own output."""
        _, members, ranks, _ = self._asked_for(mixture.experts)
        chosen, device, leading = mixture.gates.chosen, x_BTI.device.type, x_BTI.shape[:-1]
        if self._packed is None:
            self._pack()  # before any product: where factors lie must not depend on what ran before
        few = chosen is not None and not torch.is_grad_enabled() and not torch.is_autocast_enabled(device)
        if few and device == "cpu" and leading.numel() == 1:
            taken = [(members[place], gate) for place, gate in mixture.of_one_token()]
            return one_token_low_rank(x_BTI, [(m.down, m.up, gate) for m, gate in taken])
        few = few and chosen is not None and gathered_is_faster(leading.numel(), ranks, chosen.shape[-1])
        if chosen is not None and mixture.paid is not None and device == "cpu":
            # few tokens too: to see that a thousand experts are still views of one matrix takes longer than their products
            width = self.in_features + self.out_features
            if few or grouped_is_faster(leading.numel(), ranks, chosen.shape[-1], width):
                return grouped_experts(
                    x_BTI, _Factors(members), mixture.paid, chosen, mixture.grouping(leading)
                )
        down_RI, up_RO = self.packed(mixture.experts)
        if few:
            assert chosen is not None
            if ranks not in mixture.rows:
                mixture.rows[ranks] = chosen_rows(mixture.scaled, chosen, ranks, leading)
            return gathered_low_rank(x_BTI, down_RI, up_RO, mixture.rows[ranks])
        return low_rank_bank(x_BTI, down_RI, up_RO, mixture.scaled, ranks, chosen)
