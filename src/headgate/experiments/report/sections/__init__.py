"""What each method adds to a page. A section reads the names that its method logs, and draws only what it finds."""

from __future__ import annotations

from collections.abc import Callable

from headgate.experiments.report.content import Block
from headgate.experiments.report.study import Study
from headgate.plugins import Registry

HERE = "headgate.experiments.report.sections"
SECTIONS: Registry[Callable[[Study], list[Block]]] = Registry(
    "report section",
    "headgate.report_sections",
    {
        name: f"{HERE}.{name}:{name}"
        for name in ("backward_gate", "layer_routing", "schema_bank", "lora_experts")
    },
)
"""By the name of the method: a study -> blocks of its page."""

FIGURES: Registry[Callable[[Study], list[Block]]] = Registry(
    "set of figures",
    "headgate.report_figures",
    {"layer_routing": f"{HERE}.layer_routing:seed_figures"},
)
"""What ``--figures METHOD`` draws where that is more than the method's section: for layer_routing, all of its seed."""


def figures_of(method: str) -> Callable[[Study], list[Block]]:
    """What ``--figures METHOD`` draws. Raises ConfigError for a method that has no figures, listing those that have."""
    return FIGURES.get(method) if method in FIGURES else SECTIONS.get(method)
