"""Where a run goes on, and with which batch: the global batch stays what it was, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

from headgate.errors import ConfigError
from headgate.experiments.recipe import Recipe
from headgate.files import read_json
from headgate.methods.base import Method
from headgate.methods.registry import method_class
from headgate.training import processes
from headgate.training.checkpoint import STRUCTURE_FILE


def check_ranks(recipe: Recipe) -> None:
    """As many ranks run as ``model.parallel`` shares the base among. Raises ConfigError."""
    parallel, ranks = recipe.model.parallel, processes.world_size()
    if parallel is not None and parallel.ranks not in (1, ranks):
        raise ConfigError(
            f"model.parallel={parallel.told} is for {parallel.ranks} ranks, and this is {_processes(ranks)}: headgate train "
            f"--nproc {parallel.ranks} (or torchrun), or change model.parallel (null: whole on every rank)"
        )


def micro_batches(recipe: Recipe, newest: Path | None) -> int:
    """Micro-batches of an optimizer step over all ranks: the recipe's on every rank, or those the run began with.

    Raises ConfigError where this many ranks cannot make the same optimizer steps.
    """
    ranks, accumulation = processes.world_size(), recipe.training.gradient_accumulation_steps
    if newest is None:
        return ranks * accumulation
    saved = read_json(newest / STRUCTURE_FILE)
    before = len(saved.get("ranks", [None]))
    total = before * int(saved.get("gradient_accumulation_steps", accumulation))
    if before == ranks:
        return total
    cure = f"go on with {_processes(before)}, or start over with --fresh"
    for name in recipe.methods:
        if method_class(name).vote is not Method.vote:
            raise ConfigError(
                f"{name} decides once on the rows of all ranks together, and this run began on {before}: {cure}"
            )
    if total % ranks:
        raise ConfigError(
            f"this run makes its optimizer steps of {total} micro-batches, which {ranks} ranks cannot share: {cure}, or "
            f"with a number of ranks that divides {total}"
        )
    return total


def changed_ranks(newest: Path, total: int) -> str | None:
    """What is said where another number of ranks goes on."""
    before, ranks = len(read_json(newest / STRUCTURE_FILE).get("ranks", [None])), processes.world_size()
    if before == ranks:
        return None
    return (
        f"begun by {_processes(before)}, going on with {_processes(ranks)}: {total // ranks} micro-batches on each "
        "keep the optimizer steps what they were"
    )


def _processes(count: int) -> str:
    return f"{count} ranks" if count > 1 else "one process"
