"""Choosing one expert for a whole request: the chooser's files, how often it is right, and what the choice costs.

Token-level gates need Headgate (or ``--to transformers``) in the forward. A server of plain adapters takes one adapter
a request; who picks it must see the text alone.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

import headgate.serving.chooser as chooser
from headgate.data.contamination import asked
from headgate.data.streams import load_stream
from headgate.evaluation.perplexity import perplexity
from headgate.experiments.records import Figures
from headgate.experiments.run_directory import RunDirectory
from headgate.files import write_atomically
from headgate.methods.protocols import ExportsExperts

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headgate.data.streams import SkillData
    from headgate.experiments.recipe import Recipe
    from headgate.methods.lora_experts.roster import Roster

BUCKETS = 1 << 14
SMOOTHING = 0.1
"""Added to every count: a word that a skill never had is unlikely there, not impossible."""
TRAIN_ROWS, VALIDATION_ROWS = 2000, 64


def log_probabilities(texts: Sequence[Sequence[str]]) -> Tensor:
    """``[skills, BUCKETS]``: log P(bucket | skill) of the texts of each skill, smoothed."""
    counts = torch.full((len(texts), BUCKETS), SMOOTHING)
    for row, own in zip(counts, texts, strict=True):
        places = [place for text in own for place in chooser.buckets(text, BUCKETS)]
        row += torch.bincount(torch.tensor(places, dtype=torch.long), minlength=BUCKETS)
    return (counts / counts.sum(-1, keepdim=True)).log()


def chooser_of(run: str | Path, roster: Roster) -> tuple[list[dict[str, str]], chooser.Loaded | None]:
    """(skill and adapter of every skill that an expert serves, what ``chooser.choose`` needs), from the run's own stream.

    ([], None) for a run that did not train on a stream: nothing tells its experts apart.
    """
    segments = _segments(run, roster)
    entries = [{"skill": skill, "adapter": f"expert_{roster.serving(skill)}"} for skill in segments]
    if not entries:
        return [], None
    texts = [
        [asked(row) for row in segment.train.select(range(min(TRAIN_ROWS, len(segment.train))))]
        for segment in segments.values()
    ]
    return entries, (entries, log_probabilities(texts).tolist())


def _segments(run: str | Path, roster: Roster) -> dict[str, SkillData]:
    """The first segment of every skill that an expert serves."""
    directory = RunDirectory(Path(run))
    recipe = directory.recipe() if directory.recipe_file.exists() else None
    found: dict[str, SkillData] = {}
    if recipe is not None and recipe.data.stream:
        for segment in load_stream(recipe.data.stream, recipe.training.max_steps, recipe.data.overlap):
            if roster.serving(segment.skill) is not None:
                found.setdefault(segment.skill, segment)
    return found


def write_chooser(
    run: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: ExportsExperts,
    folder: Path,
) -> tuple[Figures, list[str]]:
    """``skills.json``, ``router.safetensors`` and ``chooser.py``; returns figures by skill, and notes.

    A run that did not train on a stream of skills has nothing to choose by: only ``skills.json`` is written.
    """
    roster = method.experts.roster
    entries, loaded = chooser_of(run, roster)
    scales = {f"expert_{info.number}": {"rank": info.rank, "alpha": info.alpha} for info in roster}
    content = {"skills": entries, "adapters": list(scales), "scales": scales}
    write_atomically(folder / "skills.json", json.dumps(content, indent=1))
    if loaded is None:
        return {}, [
            "no chooser was written: the run has no stream of skills whose texts would tell experts apart"
        ]
    save_file({"log_probability": torch.tensor(loaded[1])}, folder / "router.safetensors")
    write_atomically(folder / "chooser.py", Path(chooser.__file__).read_text())
    loaded, segments = chooser.load(folder), _segments(run, roster)
    recipe = RunDirectory(Path(run)).recipe()
    figures = {
        entry["skill"]: _measured(
            model, tokenizer, method, recipe, segments[entry["skill"]].validation, entry, loaded
        )
        for entry in entries
    }
    notes = [
        f"chooser, {skill}: {found['right']:.1%} of {found['rows']} validation rows go to {found['adapter']}; loss "
        f"{found['loss_chosen']:.4f} by the chosen expert, {found['loss_routed']:.4f} routed by token"
        for skill, found in figures.items()
    ]
    return {"chooser": figures}, notes


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: ExportsExperts,
    recipe: Recipe,
    rows: datasets.Dataset,
    entry: Mapping[str, str],
    loaded: chooser.Loaded,
) -> dict[str, object]:
    """Of one skill: share of its rows that go to its expert, and the loss by the expert chosen for each row."""
    rows = rows.select(range(min(VALIDATION_ROWS, len(rows))))
    picks = [chooser.choose(asked(row), loaded) for row in rows]

    def loss(part: datasets.Dataset) -> tuple[float, float]:
        found, _ = perplexity(
            model, tokenizer, part, length=recipe.data.max_length, loss_on=recipe.data.loss_on
        )
        return found["loss"] * found["tokens"], found["tokens"]

    routed, tokens = loss(rows)
    parts = []
    for name in sorted(set(picks)):
        part = rows.select([place for place, pick in enumerate(picks) if pick == name])
        method.set_routing(f"expert:{name.removeprefix('expert_')}")
        with model.disable_adapter() if isinstance(model, peft.PeftModel) else contextlib.nullcontext():
            parts.append(loss(part))
        method.set_routing("on")
    return {
        "adapter": entry["adapter"],
        "rows": len(rows),
        "right": sum(pick == entry["adapter"] for pick in picks) / len(rows),
        "loss_chosen": math.fsum(nats for nats, _ in parts) / sum(count for _, count in parts),
        "loss_routed": routed / tokens,
    }
