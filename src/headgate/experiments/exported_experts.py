"""``--to experts``: every expert and the best fixed mixture as plain PEFT adapters, with what a server needs to choose."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import peft

from headgate.errors import CheckpointError, ConfigError, ModelError
from headgate.experiments.best_mixture import best_mixture
from headgate.experiments.chosen import write_chooser
from headgate.experiments.export_checks import TOLERANCE, logits, probe, relative, reload_adapter
from headgate.experiments.records import Figures
from headgate.methods.compose import MethodStack
from headgate.models.anatomy import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def write_experts(
    run: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    methods: MethodStack,
    folder: Path,
    source: Path,
    device: str,
    mixture: str | None,
) -> tuple[list[str], float, list[str], Figures]:
    """(methods, largest difference, notes, figures of the chooser), each adapter loaded again by PEFT alone and held
    against the live model with the same routing.

    Raises ConfigError where no method keeps experts, CheckpointError where a reloaded adapter differs.
    """
    able = methods.evaluation.exporting_experts()
    if not able:
        raise ConfigError(
            f"no method of this run ({', '.join(methods.names) or 'none'}) keeps experts that can be exported: "
            "use --to peft or --to merged"
        )
    ids = probe(unwrap(model).config.get_text_config().vocab_size).to(next(model.parameters()).device)
    differences, notes = [0.0], list[str]()
    figures: Figures = {}
    for name_of_method, method in able:
        place = folder if len(able) == 1 else folder / name_of_method
        best, measured = best_mixture(method, model, tokenizer, run, mixture)
        for name, routing in method.export_experts(place, best).items():
            again = reload_adapter(place / name, source, device)
            method.set_routing(routing)
            with model.disable_adapter() if isinstance(model, peft.PeftModel) else contextlib.nullcontext():
                differences.append(relative(logits(again, ids), logits(model, ids)))
            method.set_routing("on")
            if differences[-1] > TOLERANCE[next(again.parameters()).dtype]:
                raise CheckpointError(
                    f"{place / name} was reloaded in PEFT and its logits differ by {differences[-1]:.2e} of the largest from "
                    f"the live model's with routing {routing}: it is not usable"
                )
        found, said = write_chooser(run, model, tokenizer, method, place)
        figures |= found
        notes += measured + said
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ModelError(f"{', '.join(name for name, _ in able)} has no expert yet: nothing to export")
    return [name for name, _ in able], max(differences), notes, figures
