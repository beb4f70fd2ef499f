"""What each method adds to a page. A section reads the names that its method logs, and draws only what it finds."""

from __future__ import annotations

from collections.abc import Callable

from headgate.experiments.report.content import Block
from headgate.experiments.report.sections.backward_gate import backward_gate
from headgate.experiments.report.sections.layer_routing import layer_routing, seed_figures
from headgate.experiments.report.sections.lora_experts import lora_experts
from headgate.experiments.report.sections.schema_bank import schema_bank
from headgate.experiments.report.study import Study

SECTIONS: dict[str, Callable[[Study], list[Block]]] = {
    "backward_gate": backward_gate,
    "layer_routing": layer_routing,
    "schema_bank": schema_bank,
    "lora_experts": lora_experts,
}

FIGURES = {**SECTIONS, "layer_routing": seed_figures}
"""What ``--figures METHOD`` draws: the section, and for layer_routing the whole set of its seed."""
