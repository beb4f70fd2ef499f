"""``headgate probe``: can gating pay on this model and this data, and in which form?

The model trains a little as the recipe says (the warm-up), then stands still while the stream's next rows, the pool, are
scored. From there it trains on twice, on different rows of the stream, and each time the pool's losses are taken
again: how far a row's loss fell is its gain. What the gains are worth to a gate is ``methods.backward_gate.payoff``'s.
Nothing is written; a minute on a small model, and at most about the seconds asked for on any other.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headgate.errors import ConfigError
from headgate.experiments.paths import with_paths
from headgate.experiments.prepared import Prepared, prepare_run
from headgate.experiments.recipe import Recipe
from headgate.experiments.records import Content
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.trainers import make_trainer
from headgate.methods.backward_gate import BackwardGateConfig, Gate
from headgate.methods.backward_gate.evidence import head_weight, of_sequences
from headgate.models.anatomy import Batch, Columns
from headgate.modules.head_sketch import Evidence
from headgate.ops.randomness import derive_seed, seed_device
from headgate.training.accounting import backward_flops, forward_flops

if TYPE_CHECKING:
    from transformers import Trainer

WARM_UP, CONTINUED, POOL = 48, 32, 48
"""Batches of the warm-up, of each continuation, and of the pool, where the time is enough."""
LEAST = (16, 16, 24)
"""Fewer say nothing: then the probe takes longer than it was asked to."""
GATE: Content = {"m": 256, "k": 16, "window": 64}
RATE_FALL = 0.5
"""The continuations train at half of the peak rate: what a decaying schedule has on average."""


@dataclass(frozen=True)
class Measured:
    """What was measured, over N rows and M batches of the pool.

    Attributes:
        rho: seconds of a backward and optimizer step by those of a forward. rho_flops: the same in FLOPs.
        depth: share of a forward's FLOPs up to a quarter of the blocks, the head included; ``quarter`` is that block.
        row_scores, batch_scores: ``late`` (after the whole forward) and ``early`` (after ``quarter``) -> score ->
            ``[N]`` or ``[M]``.
        gains: two of ``[N]``: fall of each row's loss over each continuation. losses, tokens, batch: ``[N]`` of each row.
    """

    rho: float
    rho_flops: float
    depth: float
    quarter: int
    row_scores: Mapping[str, Mapping[str, Tensor]]
    batch_scores: Mapping[str, Mapping[str, Tensor]]
    gains: tuple[Tensor, Tensor]
    losses: Tensor
    tokens: Tensor
    batch: Tensor
    seconds: float
    warm_up: int
    continued: int


class Prober:
    """One adapted model, its stream of batches, and the plain training loop of the probe."""

    def __init__(self, recipe: Recipe, prepared: Prepared, folder: Path) -> None:
        self.recipe = recipe
        trainer = make_trainer(prepared, RunDirectory(folder))
        self.anatomy, self.inputs_of = trainer.anatomy, trainer.model_inputs
        assert trainer.model is not None
        self.model = trainer.model
        self.device = trainer.args.device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.rate = recipe.training.learning_rate
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, weight_decay=recipe.training.weight_decay
        )
        self.batches = self._endless(trainer)
        self.steps = 0
        hidden, vocabulary = self.anatomy.hidden_size, head_weight(self.anatomy).shape[0]
        self.quarter = max(0, round(self.anatomy.num_blocks / 4) - 1)
        self.gates = {
            "late": Gate(BackwardGateConfig(score="energy", **GATE), hidden, vocabulary).to(self.device),
            "early": Gate(BackwardGateConfig(score="energy", **GATE), hidden, vocabulary).to(self.device),
        }
        # On a CPU that others use too, time that a process waits is no cost of its forward or its backward.
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.forward_seconds: list[float] = []
        self.backward_seconds: list[float] = []

    @staticmethod
    def _endless(trainer: Trainer) -> Iterator[Columns]:
        """The batches that a run would see, pass after pass."""
        loader = trainer.get_train_dataloader()
        for epoch in itertools.count():
            for part in (loader, getattr(loader, "sampler", None)):
                if part is not None and hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            yield from loader

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def train(self, batch: Mapping[str, Tensor], timed: bool = False) -> None:
        """One optimizer step of plain LoRA."""
        self.model.train()
        seed_device(derive_seed(self.recipe.seed, self.steps, "probe.dropout"), self.device)
        inputs = {k: v.to(self.device) for k, v in self.inputs_of(batch).items() if isinstance(v, Tensor)}
        self.synchronize()
        started = self.clock()
        loss = self.model(**inputs).loss
        self.synchronize()
        middle = self.clock()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.training.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
        if timed:
            self.forward_seconds.append(middle - started)
            self.backward_seconds.append(self.clock() - middle)
        self.steps += 1

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def evidence(self, batch: Mapping[str, Tensor], early: bool = False) -> Evidence:
        """Per row."""
        kind, layer = ("early", self.quarter) if early else ("late", None)
        return _rows(of_sequences(self.gates[kind], self.anatomy, batch, layer))

    def remember(self, batch: Batch) -> None:
        """Both gates take in what the warm-up learns from, as in a burn-in."""
        for early in (False, True):
            rows, gate = self.evidence(batch, early), self.gates["early" if early else "late"]
            score = gate.score(_summed(rows))
            gate.accept(score, optimizer_step=-1)
            gate.update(score)

    def warm_up(self, count: int) -> None:
        for step in range(self.steps, self.steps + count):
            batch = next(self.batches)
            self.set_rate(self.rate * min(1.0, (step + 1) / LEAST[0]))
            if step % 2 == 0:  # a look costs as much as a step, and a basis of 16 directions is full soon
                self.remember(batch)
            self.train(batch, timed=step > 0)

    def losses(self, pool: Sequence[Batch]) -> Tensor:
        """Mean loss of every row of the pool, ``[N]``."""
        found = [self.evidence(batch) for batch in pool]
        return torch.cat([rows.loss / rows.tokens.clamp(min=1) for rows in found]).double().cpu()

    def continued(self, count: int, pool: Sequence[Mapping[str, object]]) -> Tensor:
        """Losses of the pool after ``count`` further steps; model and optimizer are then put back."""
        before = [p.detach().clone() for p in self.parameters]
        state = {k: {n: _copy(v) for n, v in s.items()} for k, s in self.optimizer.state.items()}
        self.set_rate(self.rate * RATE_FALL)
        for _ in range(count):
            self.train(next(self.batches))
        losses = self.losses(pool)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        return losses


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _rows(evidence: Evidence) -> Evidence:
    """Evidence of a batch of one row has no row dimension; give it one."""
    if evidence.tokens.dim():
        return evidence
    return Evidence(*(value[None] for value in vars(evidence).values()))


def measure(recipe: Recipe, seconds: float, say: Callable[[str], None]) -> Measured:
    """Train a little, look, train on twice. Raises ConfigError for a recipe without training, or too little data."""
    recipe = with_paths(recipe)
    if recipe.steps_given == 0 or recipe.lora is None:
        missing = "trains for 0 steps" if recipe.steps_given == 0 else "has no lora"
        raise ConfigError(
            f"probe asks what gating would save of training an adapter, and this recipe {missing}: give training.max_steps "
            "and lora"
        )
    plain = recipe.model_copy(update={"methods": {}, "evaluation": [], "report_to": []})
    prepared = prepare_run(plain)
    rows = sum(map(len, prepared.train.values())) if isinstance(prepared.train, dict) else len(prepared.train)
    if rows < 3 * recipe.training.per_device_train_batch_size:
        raise ConfigError(
            f"{rows} rows make fewer than 3 batches of {recipe.training.per_device_train_batch_size}: a gate has nothing to "
            "choose among; train on all of them, or give more data"
        )
    started = time.perf_counter()
    fastest = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        prober = Prober(plain, prepared, Path(folder))
        for _ in range(3):
            begun = time.perf_counter()
            prober.warm_up(1)
            fastest = min(fastest, time.perf_counter() - begun)
        warm_up, count, size = _affordable(plain, seconds, fastest)
        say(f"warm-up: {warm_up} steps; pool: {size} batches; then twice {count} steps")
        prober.warm_up(warm_up - 3)
        pool = [next(prober.batches) for _ in range(size)]
        seen = {kind: [prober.evidence(batch, kind == "early") for batch in pool] for kind in prober.gates}
        late = seen["late"]
        before = torch.cat([rows.loss / rows.tokens.clamp(min=1) for rows in late]).double().cpu()
        gains = [before - prober.continued(count, pool) for _ in range(2)]
    forward, backward = map(statistics.median, (prober.forward_seconds, prober.backward_seconds))
    return Measured(
        rho=backward / forward,
        rho_flops=_rho_flops(prober),
        depth=_depth(prober),
        quarter=prober.quarter,
        row_scores={
            kind: _scores(
                prober.gates[kind], [_row(rows, i) for rows in found for i in range(len(rows.tokens))]
            )
            for kind, found in seen.items()
        },
        batch_scores={
            kind: _scores(prober.gates[kind], [_summed(rows) for rows in found])
            for kind, found in seen.items()
        },
        gains=(gains[0], gains[1]),
        losses=before,
        tokens=torch.cat([rows.tokens for rows in late]).double().cpu(),
        batch=torch.cat([torch.full((len(r.tokens),), i) for i, r in enumerate(late)]),
        seconds=time.perf_counter() - started,
        warm_up=warm_up,
        continued=count,
    )


def _affordable(recipe: Recipe, seconds: float, step_seconds: float) -> tuple[int, int, int]:
    """Counts that fit; a look at a batch costs about a third of a step."""
    given = recipe.steps_given
    wanted = (min(WARM_UP, max(LEAST[0], given // 2)) if given else WARM_UP, CONTINUED, POOL)
    needed = step_seconds * (wanted[0] + 2 * wanted[1] + wanted[2] * 4 / 3)
    share = min(1.0, seconds / needed)
    return tuple(max(least, round(share * count)) for least, count in zip(LEAST, wanted, strict=True))  # type: ignore[return-value]


def _row(rows: Evidence, place: int) -> Evidence:
    return Evidence(*(value[place] for value in vars(rows).values()))


def _summed(rows: Evidence) -> Evidence:
    """The evidence of a whole micro-batch."""
    return Evidence(*(value.sum(0) for value in vars(rows).values()))


def _scores(gate: Gate, units: Sequence[Evidence]) -> dict[str, Tensor]:
    """Energy and loss of every unit, against the subspace as it stands."""
    scores = [gate.score(unit) for unit in units]
    return {
        "energy": torch.tensor([score.raw for score in scores]).double(),
        "loss": torch.tensor([score.seen.loss for score in scores]).double(),
    }


def _rho_flops(prober: Prober) -> float:
    forward = forward_flops(prober.anatomy, 1.0, 0.0)
    return backward_flops(forward, 1.0, sum(p.numel() for p in prober.parameters)) / forward


def _depth(prober: Prober) -> float:
    """FLOPs of the blocks up to a quarter and the head, by those of a forward."""
    share = (prober.quarter + 1) / prober.anatomy.num_blocks
    return forward_flops(prober.anatomy, 1.0, 0.0, share) / forward_flops(prober.anatomy, 1.0, 0.0)
