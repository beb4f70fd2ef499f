"""What is reported of depth: the log line of a step, and open gates tallies on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.route import Route
from headgate.methods.layer_routing.shares import Shares, open_rates
from headgate.ops.depth import adaptivity, binary_entropy


def telemetry(route: Route) -> dict[str, Tensor]:
    """Open rates of a route on real tokens, and whether its gates depend on the token."""
    opened, rates = (route.weight != 0).float(), open_rates(route)
    line = {
        "routing/blocks": rates,
        "routing/dead": (rates == 0).sum().float(),
        "routing/always_on": (rates == 1).sum().float(),
        "routing/adaptivity": adaptivity(opened, route.context.valid).mean(),
    }
    if route.logits is not None:
        line["routing/entropy"] = binary_entropy(torch.sigmoid(route.logits)).mean() / math.log(2)
    return line


class Tally:
    """Open gates on real tokens, tallies on the device: one sum a forward.

    ``padding``: the id that generation fills a finished row with; such a token is not real, though its mask says so.
    """

    def __init__(
        self, tokens: int = 0, opened: Sequence[int] | None = None, padding: int | None = None
    ) -> None:
        self.tokens: Tensor | int = tokens
        self.opened: Tensor | int = 0 if opened is None else torch.tensor(opened)
        self.padding = padding

    def counts(self) -> tuple[int, list[int] | None]:
        """Real tokens, and of each gate how many of them it was open for; JSON."""
        return int(self.tokens), self.opened.tolist() if isinstance(self.opened, Tensor) else None

    def add(self, route: Route) -> None:
        context, valid = route.context, route.context.valid
        if self.padding is not None and context.past and context.ids is not None:
            valid = valid & (context.ids != self.padding)
        opened = (route.weight != 0) & valid.unsqueeze(-1)
        self.tokens = self.tokens + valid.sum()
        self.opened = self.opened + opened.sum((0, 1))


class DepthRecord:
    """Tallies of the last validation, one a skill, saved with the run; and that of an evaluation in progress."""

    def __init__(self, config: LayerRoutingConfig) -> None:
        self.config = config
        self.by_skill: dict[str | None, Tally] = {}
        self.current: Tally | None = None

    def start(self, skill: str | None) -> None:
        self.current = self.by_skill[skill] = Tally()

    def start_task(self, padding: int | None) -> None:
        self.current = Tally(padding=padding)

    def stop(self) -> None:
        self.current = None

    def add(self, route: Route) -> None:
        """Count an inference forward, where something is being evaluated."""
        if self.current is not None:
            self.current.add(route)

    def counts(self) -> list[list[object]]:
        """JSON, for ``restore``."""
        return [[skill, *tally.counts()] for skill, tally in self.by_skill.items()]

    def restore(self, counts: Iterable[tuple[str | None, int, Sequence[int] | None]]) -> None:
        self.by_skill = {skill: Tally(tokens, opened) for skill, tokens, opened in counts}

    def of_task(self, shares: Shares, engine: str, routing: str) -> dict[str, float]:
        """``depth`` and ``executed_share`` of the evaluation in progress; {} where no token was seen."""
        if self.config.policy == "dense" or routing == "removed":
            return {"depth": 1.0, "executed_share": 1.0}
        means = self._means([self.current] if self.current is not None else [], shares, engine)
        return dict(zip(("depth", "executed_share"), means[:2], strict=True)) if means is not None else {}

    def of_validation(self, shares: Shares, engine: str) -> dict[str, float]:
        """Utilization, adaptivity (nats, mean over gates) and executed share, ``..._eval``; {} where none ran."""
        means = self._means(self.by_skill.values(), shares, engine)
        if means is None:
            return {}
        names = ("routing_utilization_eval", "routing_executed_eval", "routing_adaptivity_eval")
        return dict(zip(names, means, strict=True))

    def _means(
        self, tallies: Iterable[Tally], shares: Shares, engine: str
    ) -> tuple[float, float, float] | None:
        """Gates at inference are 0 or 1, so I(gate; token) = H(E p) - E H(p) is the entropy of the open rate."""
        tallies = [tally for tally in tallies if int(tally.tokens)]
        if not tallies:
            return None
        tokens = torch.stack([torch.as_tensor(tally.tokens) for tally in tallies]).sum()
        rates = torch.stack([torch.as_tensor(tally.opened) for tally in tallies]).sum(0) / tokens
        executed = torch.as_tensor(shares.executed(rates, self.config, engine)) + shares.first_forward
        return float(shares.used_at(rates)), float(executed), float(binary_entropy(rates).mean())
