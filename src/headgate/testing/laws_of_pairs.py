"""The laws of a Method beside another."""

from __future__ import annotations

from headgate.errors import HeadgateError
from headgate.testing.case import Case, differing, weights_of
from headgate.testing.law import law
from headgate.testing.laws import what_is_saved_is_what_was_live

SHORTEST = 4
"""Optimizer steps in which every stage of every curriculum has one."""


@law
def the_order_of_methods_does_not_matter(case: Case) -> None:
    """Beside any other method, written in either order, the run ends with the same parameters."""
    for name, options in PARTNERS.items():
        if name == case.name or _refusal(case.beside(**{name: options})) is not None:
            continue
        written, other = (
            case.beside(**{name: options}),
            Case(name, options, case.folder, case.model, {case.name: case.options}),
        )
        wrong = differing(weights_of(written.trained()), weights_of(other.trained()))
        assert not wrong, f"with {name}: {wrong[:4]} differ"


@law
def every_pair_works_or_is_refused_by_name(case: Case) -> None:
    """Beside each of Headgate's methods: trained, saved, loaded and equal, or refused before training, naming both."""
    for name, options in PARTNERS.items():
        if name == case.name:
            continue
        pair = case.beside(**{name: options})
        refusal = _refusal(pair)
        if refusal is None:
            what_is_saved_is_what_was_live(pair)
            continue
        assert case.name in refusal and name.split("_")[0] in refusal, (
            f"with {name}: refused, but not by name: {refusal}"
        )


def _refusal(pair: Case) -> str | None:
    """Why the pair is refused; None where it trains."""
    try:
        pair.trained({"training.max_steps": SHORTEST})
    except HeadgateError as error:
        return str(error)
    return None


PARTNERS: dict[str, dict[str, object]] = {
    "schema_bank": {"num_schemas": 4, "rank": 2, "tags": "hash"},
    "layer_routing": {"policy": "gumbel", "granularity": "sample", "keep": 1, "kd": False},
    "lora_experts": {"experts": 2, "r": 2, "alpha": 4, "target_modules": ["q_proj"]},
    "backward_gate": {"m": 32, "k": 4, "window": 8, "burn_in": 1, "target_acceptance": 0.5},
    "ewc": {"strength": 1.0},
}
"""Settings in which Headgate's own methods do something within a few steps."""
