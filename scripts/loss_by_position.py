"""Where in a document do a stream's experts pay for not being told whose it is?

    python scripts/loss_by_position.py RUN

Of every skill of a finished stream, on its validation rows: loss as the router mixes the experts, less the loss of the skill's own
expert alone, by position in the document, and over all of it.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import headgate as hg
from headgate.data.preparation import prepare
from headgate.data.streams import load_stream
from headgate.experiments.run_directory import RunDirectory
from headgate.methods.lora_experts import LoraExperts

ENDS = (0, 4, 16, 64, 1 << 30)


@torch.no_grad()
def token_losses(model: Any, rows: Any) -> list[Tensor]:
    """Of every row, the loss of each token after the first."""
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    directory = RunDirectory(parser.parse_args().run)
    recipe = directory.recipe()
    if not recipe.data.stream:
        raise SystemExit(f"{directory.path} trained no stream: give a run with data.stream")
    model, tokenizer = hg.load(directory.path, device="cpu")
    method = next((one for one in model.headgate_methods if isinstance(one, LoraExperts)), None)
    if method is None:
        raise SystemExit(f"{directory.path} has no experts: give a run of lora_experts")
    spans = [*itertools.pairwise(ENDS), (0, ENDS[-1])]
    table = Table("skill", *(f"{a}-{b}" if b < ENDS[-1] else f"{a}-" for a, b in spans[:-1]), "all")
    segments = load_stream(recipe.data.stream, recipe.training.max_steps, recipe.data.overlap)
    for segment in {segment.skill: segment for segment in segments}.values():
        expert = method.experts.roster.serving(segment.skill)
        if expert is None:
            table.add_row(segment.skill, "no expert serves it")
            continue
        rows = prepare(segment.validation, tokenizer, recipe.data, packing=False).dataset
        mixed = token_losses(model, rows)
        method.set_routing(f"expert:{expert}")
        alone = token_losses(model, rows)
        method.set_routing("on")
        costs = [m - a for m, a in zip(mixed, alone, strict=True)]
        means = [torch.cat([cost[a:b] for cost in costs]) for a, b in spans]
        table.add_row(segment.skill, *(f"{float(part.mean()):+.3f}" if len(part) else "-" for part in means))
    Console().print(table)


if __name__ == "__main__":
    main()
