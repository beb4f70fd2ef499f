"""Is a skill recognised when it returns? Detection on streams of 100 segments, forward passes only.

Every segment offers fresh documents of one skill; the policy says novel (an expert is founded), known or undecided
(more documents of the segment are looked at, up to three times as many). Nothing is trained.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from headgate.data.collation import Collator
from headgate.data.config import DataConfig, SourceConfig
from headgate.data.preparation import prepare
from headgate.data.sources import load_rows
from headgate.data.wordmath import FAMILIES
from headgate.experiments.benchmarks.frame import Report, Say, at_least, at_most, not_measured
from headgate.methods.lora_experts.probe import reference_text, skill_embeddings
from headgate.methods.lora_experts.spawn import Decision, Evidence, SpawnConfig, SpawnPolicy, build_policy
from headgate.models.load import load_model
from headgate.modules.skill_library import SkillLibrary
from headgate.ops.novelty import token_mean
from headgate.ops.randomness import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEGMENTS, DOCUMENTS, LOOK, LOOKS = 100, 720, 48, 3
RECURRENCE = 0.75
"""Chance that a segment brings back a skill while there are new ones left."""
RULES = {
    "fixed": SpawnConfig(threshold="fixed"),
    "calibrated": SpawnConfig(),
    "calibrated, contrast": SpawnConfig(contrast=200),
}
CORPORA: dict[str, dict[str, Any]] = {
    "stories": {"source": "text", "path": "tinystories/tinystories_sample.txt"},
    "shakespeare": {"source": "text", "path": "tinyshakespeare/input.txt", "options": {"chunk_characters": 500}},
    "gsm8k": {"source": "gsm8k", "path": "gsm8k/train.jsonl"},
    "code": {"source": "codealpaca", "path": "codealpaca/new_codealpaca.json"},
    "encyclopedia": {"source": "wikitext", "path": "wikitext-2/wiki.train.raw.5k.txt"},
}  # fmt: skip


def prepared(
    source: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, seed: int, documents: int = DOCUMENTS
) -> Dataset:
    """At most so many documents of a skill, every token trained, cut at 256."""
    rows = load_rows(SourceConfig.model_validate({"limit": documents, "seed": seed, **source}))
    config = DataConfig(max_length=256, loss_on="all", long_prompts="drop")
    return prepare(rows, tokenizer, config, context_length=256).dataset


class Looks:
    """Fresh documents of each skill through the bare model, look after look; the same for every policy.

    From the start again only where a skill has been read to its end.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        skills: Mapping[str, dict[str, object]],
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.skills, self.seed = model, tokenizer, skills, seed
        self._rows: dict[str, Dataset] = {}
        self._seen: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, skill: str, number: int) -> tuple[Tensor, Tensor]:
        """Embeddings ``[N, H]`` and token counts ``[N]`` of the skill's look of that number."""
        rows = self._rows.setdefault(skill, self._rows.get(skill) or self._load(skill))
        number %= len(rows) // LOOK
        if (skill, number) not in self._seen:
            chosen = [rows[i] for i in range(number * LOOK, (number + 1) * LOOK)]
            batch = Collator(self.tokenizer.pad_token_id)(chosen)
            self._seen[skill, number] = skill_embeddings(self.model, [batch])
        return self._seen[skill, number]

    def _load(self, skill: str) -> Dataset:
        found = prepared(self.skills[skill], self.tokenizer, self.seed)
        stream = generator(self.seed, 0, "novelty.documents")
        return found.select(torch.randperm(len(found), generator=stream).tolist())


@dataclass
class Tally:
    """What happened on one stream. ``scores``: threshold - similarity at the first look; ``novel``: the truth."""

    scores: list[float] = field(default_factory=list)
    novel: list[bool] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    misrouted: int = 0
    experts: int = 0
    clusters: int = 0
    seconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        novel, kinds, scores = np.array(self.novel), np.array(self.kinds), np.array(self.scores)
        wins = mannwhitneyu(scores[novel], scores[~novel]).statistic
        returns, news = (~novel).sum(), novel.sum()
        return {
            "auroc": float(wins / (news * returns)),
            "false_spawns": float(((kinds == "novel") & ~novel).sum() / returns),
            "missed": float(((kinds == "known") & novel).sum() / news),
            "undecided": float((kinds == "undecided").mean()),
            "misrouted": self.misrouted / float(returns),
            "experts": self.experts,
            "clusters": self.clusters,
            "decision_ms": 1e3 * float(np.median(self.seconds)),
        }


def skill_order(skills: Sequence[str], seed: int) -> Iterator[str]:
    """The skill of each segment: new ones at random times, then recurrences."""
    stream = generator(seed, 0, "novelty.order")
    waiting = [skills[i] for i in torch.randperm(len(skills), generator=stream).tolist()]
    met: list[str] = []
    for _ in range(SEGMENTS):
        if waiting and (not met or float(torch.rand((), generator=stream)) > RECURRENCE):
            met.append(waiting.pop())
            yield met[-1]
        else:
            yield met[int(torch.randint(len(met), (), generator=stream))]


def detect(looks: Looks, config: SpawnConfig, mix: tuple[Tensor, Tensor], seed: int) -> Tally:
    """Run the policy over one stream; ``mix`` is the reference text."""
    reference = token_mean(*mix)
    library = SkillLibrary(len(reference), seed=seed, contrast=config.contrast)
    library.set_reference(reference, mix[0])
    policy, tally, founder = build_policy(config, library, seed), Tally(), dict[int, str]()
    looked: Counter[str] = Counter()
    for segment, skill in enumerate(skill_order(list(looks.skills), seed)):
        embeddings, tokens = looks(skill, looked[skill])
        looked[skill] += 1
        if not founder:
            library.add(0, embeddings, tokens)
            founder[0] = skill
            continue
        decision = _decide(policy, embeddings, tokens, segment, tally)
        tally.scores.append(decision.threshold - decision.similarity)
        tally.novel.append(skill not in founder.values())
        for _ in range(LOOKS - 1):
            if decision.kind != "undecided":
                break
            more, their_tokens = looks(skill, looked[skill])
            looked[skill] += 1
            embeddings, tokens = torch.cat([embeddings, more]), torch.cat([tokens, their_tokens])
            decision = _decide(policy, embeddings, tokens, segment, tally)
        tally.kinds.append(decision.kind)
        if decision.kind == "novel":
            founder[len(founder)] = skill
            library.add(len(founder) - 1, embeddings, tokens)
        elif decision.kind == "known":
            assert decision.expert is not None
            tally.misrouted += not tally.novel[-1] and founder[decision.expert] != skill
            library.update(decision.expert, embeddings, tokens)
    tally.experts, tally.clusters = len(founder), len(looked)
    return tally


def _decide(policy: SpawnPolicy, embeddings: Tensor, tokens: Tensor, segment: int, tally: Tally) -> Decision:
    start = time.perf_counter()
    evidence = Evidence(
        embeddings, tokens, global_step=segment * 1000, num_experts=len(policy.library.experts)
    )
    decision = policy.decide(evidence)
    tally.seconds.append(time.perf_counter() - start)
    return decision


def sources(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    """Streams by name: the embedded word problems, and these with the real corpora where the folder has them."""
    made: dict[str, dict[str, object]] = {
        f: {"source": "wordmath", "options": {"families": [f]}} for f in FAMILIES
    }
    if not folder.is_dir():
        return {"wordmath": made}
    corpora = {n: {**s, "path": str(folder / s["path"])} for n, s in CORPORA.items()}
    return {"wordmath": made, "wordmath and corpora": {**made, **corpora}}


def run(*, quick: bool, say: Say) -> Report:
    """AUROC, false spawns and experts found against true skills, by stream and kind of threshold."""
    report, folder = Report("novelty"), Path(os.environ.get("HEADGATE_SHARED", "../shared")) / "data"
    model, tokenizer = load_model("embedded", lora=None)
    mix = skill_embeddings(model, [reference_text(model, 0)])
    for stream, skills in sources(folder).items():
        tallies: dict[str, list[Tally]] = {name: [] for name in RULES}
        for seed in range(1 if quick else 3):
            say(f"novelty: {len(skills)} skills of {stream}, stream {seed}")
            looks = Looks(model, tokenizer, skills, seed)
            for rule, found in tallies.items():
                found.append(detect(looks, RULES[rule], mix, seed))
        for rule, found in tallies.items():
            every = [tally.figures() for tally in found]
            mean = {name: float(np.mean([one[name] for one in every])) for name in every[0]}
            report.arms[f"{stream}, {rule}"] = {
                **mean,
                "streams": every,
                "scores": [[round(x, 4) for x in tally.scores] for tally in found],
                "novel": [tally.novel for tally in found],
            }
    best = report.arms["wordmath, calibrated"]
    report.checks += [
        at_least("AUROC of skill novelty, wordmath", best["auroc"], 0.98),
        at_most("false spawns, wordmath", best["false_spawns"], 0.02),
    ]
    real = report.arms.get("wordmath and corpora, calibrated")
    if real is None:
        why = f"{folder} is absent: set HEADGATE_SHARED"
        report.checks.append(not_measured("AUROC of skill novelty, with real corpora", ">= 0.98", why))
    else:
        report.checks += [
            at_least("AUROC of skill novelty, with real corpora", real["auroc"], 0.98),
            at_most("false spawns, with real corpora", real["false_spawns"], 0.02),
        ]
    return report
