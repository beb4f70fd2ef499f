"""Routes of an evaluation, as text: ``on``, ``removed``, ``arrow``, one expert, or fixed gates over several."""

from __future__ import annotations

import math

from headgate.errors import ConfigError
from headgate.methods.lora_experts.experts import ExpertSet

ON, REMOVED, ARROW, ONE, MIXTURE = "on", "removed", "arrow", "expert:", "mixture:"


def is_fixed(route: str) -> bool:
    """Whether the route says every gate by itself."""
    return route.startswith((ONE, MIXTURE))


def check_route(route: str, experts: ExpertSet) -> None:
    """Raises ConfigError for a route that there is not."""
    if is_fixed(route):
        fixed_weights(route, experts)
    elif route not in (ON, REMOVED, ARROW):
        raise ConfigError(
            f"routing {route!r} is not one of on, removed, arrow, expert:<number or skill>, "
            "mixture:<number or skill>=<weight>,..."
        )


def fixed_weights(route: str, experts: ExpertSet) -> dict[int, float]:
    """The gates that a route ``expert:`` or ``mixture:`` names, by expert number."""
    if route.startswith(ONE):
        return {experts.number_of(route.removeprefix(ONE)): 1.0}
    weights: dict[int, float] = {}
    for part in route.removeprefix(MIXTURE).split(","):
        expert, _, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            raise ConfigError(f"{route!r}: {part!r} is not <number or skill>=<weight>") from None
        number = experts.number_of(expert.strip())
        if number in weights or not math.isfinite(value):
            raise ConfigError(f"{route!r}: give expert {number} one finite weight")
        weights[number] = value
    return weights
