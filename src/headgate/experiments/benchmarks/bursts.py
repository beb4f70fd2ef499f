"""Is a skill found that comes unannounced? Long segments of a known skill with a share of another, forward passes only.

A method with ``burst: 32`` founds its expert on a skill, then reads thousands of that skill's documents, of which a
share belongs to a skill that nobody announced. Counted: in how many segments a burst was declared, after how many
documents of the new skill, how many of the burst are of it; and, where the share is zero, how often chance made one.
The policy's performance gate is off: nothing is trained here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from headgate.data.collation import Collator
from headgate.experiments.benchmarks.frame import Report, Say, at_least, at_most, not_measured
from headgate.experiments.benchmarks.novelty import prepared, sources
from headgate.experiments.records import Figures
from headgate.methods.documents import document_ids, documents_in
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.stage import ScheduledStage, Stage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, describe
from headgate.models.load import load_model
from headgate.ops.randomness import generator

LEAST, ROWS = 32, 16
DOCUMENTS, PROBE = 2400, 16
"""Of a segment: three times what a document waits for. Of the look at a known skill: batches."""
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)
PAIRS = {
    "wordmath": [("shopping", "farm"), ("sports", "cooking"), ("savings", "building")],
    "wordmath and corpora": [("stories", "shopping"), ("gsm8k", "code"), ("encyclopedia", "shakespeare")],
}
"""Of each stream: the known skill and the one that comes unannounced."""


class Documents:
    """Fresh documents of a skill without end: read again, in another order, only once all were read."""

    def __init__(self, rows: Sequence[Mapping[str, object]], seed: int) -> None:
        self.rows, self._stream = rows, generator(seed, 0, "bursts.documents")
        self._order: Iterator[int] = iter(())

    def __call__(self) -> Mapping[str, object]:
        place = next(self._order, None)
        if place is None:
            self._order = iter(torch.randperm(len(self.rows), generator=self._stream).tolist())
            place = next(self._order)
        return self.rows[place]


def segment(
    anatomy: Anatomy,
    collator: Collator,
    known: Documents,
    other: Documents,
    share: float,
    seed: int,
    documents: int = DOCUMENTS,
) -> Figures:
    """Read one segment to its first burst, or to its end; what was found."""
    spawn = {"policy": "novelty", "cooldown": 0, "loss_ratio": 0.0}
    method = LoraExperts(router="prototype", burst=LEAST, r=1, spawn=spawn)
    method.seed = seed
    method.attach(anatomy)
    watch = method.watch
    assert watch is not None
    stage = Stage(name="known", steps=documents, train={}, options={"skill": "known"})
    scheduled = ScheduledStage(stage, index=0, start=0, stop=documents)
    stream = generator(seed, 0, "bursts.share")
    probe = [collator([known() for _ in range(ROWS)]) for _ in range(PROBE)]
    try:
        method.on_stage_start(scheduled, probe)
        news: set[int] = set()
        arrived = 0
        for number in range(documents // ROWS):
            unannounced = torch.rand(ROWS, generator=stream) < share
            batch = collator([other() if new else known() for new in unannounced.tolist()])
            news.update(document_ids(documents_in(batch))[unannounced].tolist())
            arrived += int(unannounced.sum())
            step = Step(batch, scheduled, number, number, seed, documents, anatomy.model)
            watch.read(step, method.stream)
            if watch.due:
                of_it = np.mean([one in news for one in watch.burst.ids.tolist()])
                read = (number + 1) * ROWS
                return {"found": True, "documents": read, "arrived": arrived, "purity": float(of_it)}
    finally:
        method.detach()
    read = documents // ROWS * ROWS
    return {"found": False, "documents": read, "arrived": arrived, "purity": None}


def run(*, quick: bool, say: Say) -> Report:
    """Found, documents of the new skill until then, and purity, by stream and share of the new skill."""
    report, folder = Report("bursts"), Path(os.environ.get("HEADGATE_SHARED", "../shared")) / "data"
    model, tokenizer = load_model("embedded", lora=None)
    anatomy, collator = describe(model), Collator(tokenizer.pad_token_id)
    for stream, skills in sources(folder).items():
        pairs, seeds = (PAIRS[stream][:1], (0,)) if quick else (PAIRS[stream], (0, 1))
        found: dict[float, list[Figures]] = {share: [] for share in SHARES}
        for (known, other), seed in itertools.product(pairs, seeds):
            rows = {
                name: prepared(skills[name], tokenizer, seed, documents=DOCUMENTS) for name in (known, other)
            }
            for share in SHARES:
                texts = [Documents(rows[name], seed) for name in (known, other)]
                read = segment(anatomy, collator, texts[0], texts[1], share, seed)
                found[share].append({"known": known, "other": other, "seed": seed, **read})
            say(f"bursts: {other} in {known}, seed {seed}: " + _said(found))
        for share, every in found.items():
            hits = [one for one in every if one["found"]]
            report.arms[f"{stream}, {share:.0%}"] = {
                "share": share,
                "found": float(np.mean([one["found"] for one in every])),
                "documents_until": float(np.mean([one["arrived"] for one in hits])) if hits else None,
                "purity": float(np.mean([one["purity"] for one in hits])) if hits else None,
                "bursts_per_1000_documents": 1e3 * len(hits) / sum(one["documents"] for one in every),
                "segments": every,
            }
    for stream in PAIRS:
        name, alone = (
            f"bursts made by chance, per 1,000 documents, {stream}",
            report.arms.get(f"{stream}, 0%"),
        )
        if alone is None:
            report.checks.append(not_measured(name, "<= 0.1", f"{folder} is absent: set HEADGATE_SHARED"))
        else:
            report.checks.append(at_most(name, alone["bursts_per_1000_documents"], 0.1))
    found_all = report.arms["wordmath, 10%"]["found"]
    report.checks.append(at_least("found at a share of 10%, wordmath", found_all, 1.0))
    return report


def _said(found: Mapping[float, Sequence[Mapping[str, object]]]) -> str:
    told = []
    for share, every in found.items():
        last = every[-1]
        end = f"after {last['arrived']:.0f} of them, purity {last['purity']:.2f}" if last["found"] else "none"
        told.append(f"{share:.0%} {end}")
    return "; ".join(told)
