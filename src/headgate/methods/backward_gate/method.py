"""BackwardGate: the gate as a method of HeadgateTrainer, and as a drop-in for a plain loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from headgate.config import build_config
from headgate.errors import ConfigError
from headgate.methods.backward_gate import costs, evidence, policies, reporting
from headgate.methods.backward_gate.auto_off import AutoOff
from headgate.methods.backward_gate.checks import DECISIONS, complaints
from headgate.methods.backward_gate.config import BackwardGateConfig
from headgate.methods.backward_gate.diagnostic import ProxyDiagnostic, look
from headgate.methods.backward_gate.drop_in import PlainLoop, check_sizes
from headgate.methods.backward_gate.gate import Gate, Score
from headgate.methods.backward_gate.memory import ExampleMemory
from headgate.methods.backward_gate.saved import refuse_changed
from headgate.methods.backward_gate.tokens import TokenDraw
from headgate.methods.backward_gate.truth import TRUTH, share_of_new, truth_maker
from headgate.methods.backward_gate.views import LEFT_OUT, SELECTED, WEIGHT, PooledSequences, RememberedRows
from headgate.methods.base import Method
from headgate.methods.costs import StepCost
from headgate.methods.protocols import DataView
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch
from headgate.modules.fused_head import HeadChunk
from headgate.modules.head_sketch import Evidence
from headgate.modules.structure import Structure

log = logging.getLogger("headgate")


class BackwardGate(PlainLoop, Method):
    """Decides from the forward alone whether a micro-batch deserves its backward.

    ``BackwardGate(target_acceptance=.3)`` for HeadgateTrainer, which attaches it. With ``d_hidden`` and
    ``vocab_size`` it is ready for a loop of your own (see ``PlainLoop``); ``total_steps`` then sets the length of
    the run, ``seed`` the tables and draws, ``accumulation`` the micro-batches per optimizer step.
    Raises ConfigError for a burn-in as long as the run (it would never gate), ModelError for a model without a
    head.
    """

    name = "backward_gate"
    Config = BackwardGateConfig
    attach_order = 40
    adapter_alone = True
    neutral: ClassVar[Mapping[str, object]] = {"target_acceptance": 1.0}
    telemetry_names = ("gate/<part>",)
    citation = "@misc{slora2024, title={SLoRA: Subspace-Gated LoRA for Token-Efficient Fine-Tuning}, author={Adib Hasan}, year={2024}}"

    def __init__(
        self,
        config: BackwardGateConfig | None = None,
        *,
        d_hidden: int | None = None,
        vocab_size: int | None = None,
        total_steps: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__(config, **options)
        settings: BackwardGateConfig = self.config
        self.seed, self.accumulation, self.max_steps = seed, accumulation, total_steps
        self.gate: Gate | None = None
        self.anatomy: Anatomy | None = None
        slots, every = settings.memory_slots, settings.rescore_every
        self.memory = ExampleMemory(slots, every) if settings.memory else None
        self.auto_off = AutoOff() if settings.auto_off else None
        looks = settings.diagnostic_every > 0 and settings.score in policies.SKETCHING and settings.m >= 16
        self.diagnostic = ProxyDiagnostic(settings.m) if looks else None
        thins = settings.score == "token"
        self.tokens = TokenDraw(settings.token_score, settings.target_acceptance) if thins else None
        self._score: Score | None = None
        self._accepts, self._burning, self._checked = True, False, False
        self._milliseconds, self._epoch = 0.0, 0
        if total_steps:
            self.check_run(total_steps)
        check_sizes(settings, d_hidden, vocab_size, total_steps)
        if d_hidden is not None and vocab_size is not None:
            self._build(d_hidden, vocab_size)
            self.to(device or "cpu")

    def _build(self, hidden_size: int, vocab_size: int) -> None:
        burn_in = self.config.resolved_burn_in(self.max_steps or 20_000)
        run = {"seed": self.seed, "burn_in": burn_in, "max_steps": self.max_steps}
        self.gate = Gate(self.config, hidden_size, vocab_size, **run)

    def check_model(self, anatomy: Anatomy) -> None:
        """Raises ConfigError for a ``score_layer`` that the model does not have, or after which nothing is left."""
        layer = self.config.score_layer
        if layer is not None and layer >= anatomy.num_blocks - 1:
            raise ConfigError(
                f"score_layer={layer}: the model has {anatomy.num_blocks} blocks, and stopping after its last saves "
                f"nothing; give 0..{anatomy.num_blocks - 2}, or leave score_layer out"
            )

    def attach(self, anatomy: Anatomy) -> None:
        weight = evidence.head_weight(anatomy)
        self.check_model(anatomy)
        self.anatomy = anatomy
        if self.gate is None:
            self._build(anatomy.hidden_size, weight.shape[0])
            self.to(weight.device)

    def detach(self) -> None:
        super().detach()
        self.anatomy = None

    @property
    def attached(self) -> bool:
        return self.anatomy is not None

    def check_run(self, max_steps: int) -> None:
        burn_in = self.config.resolved_burn_in(max_steps)
        if 0 < max_steps <= burn_in and self.config.target_acceptance < 1:
            raise ConfigError(
                f"burn_in={burn_in} lasts as long as the run ({max_steps} optimizer steps), so it would never gate: "
                "lower burn_in (default: a tenth of the run) or raise max_steps"
            )
        self.max_steps = max_steps
        if self.gate is not None:
            self.gate.burn_in, self.gate.max_steps = burn_in, max_steps

    def columns(self) -> Sequence[str]:
        names = ("example_id",) if self.memory is not None else ()
        return (*names, TRUTH) if self.config.score == "oracle" else names

    def column_makers(self) -> Mapping[str, Callable[[Mapping[str, object]], object]]:
        settings: BackwardGateConfig = self.config
        if settings.column is None:
            return {}
        return {TRUTH: truth_maker(settings.column, settings.column_values)}

    @property
    def forms_batches(self) -> bool:
        return self.config.granularity == "sequence" or self.memory is not None

    def data_view(self, batches: Iterable[Batch], epoch: Callable[[], int] = lambda: 0) -> DataView | None:
        if self.config.granularity == "sequence":
            factor = self.config.pool_factor
            return PooledSequences(batches, self._core(), self._evidence_of_sequences, factor)
        return None if self.memory is None else RememberedRows(batches, self.memory, epoch)

    def structure(self) -> Structure:
        gate = self._core()
        hidden_size, vocab_size = gate.settings[:2].tolist()
        sizes = {"d_hidden": hidden_size, "vocab_size": vocab_size}
        return {**super().structure(), **sizes, "seed": gate.seed, "max_steps": gate.max_steps}

    @classmethod
    def from_structure(cls, structure: Structure) -> BackwardGate:
        method = cls(build_config(cls.Config, structure["config"]), seed=structure["seed"])
        method.max_steps = structure["max_steps"]
        method._build(structure["d_hidden"], structure["vocab_size"])
        return method

    def restore(self, structure: Structure) -> None:
        refuse_changed(structure["config"], self.structure()["config"])

    # -- one micro-batch ----------------------------------------------------------------------------
    @property
    def partial_block(self) -> int | None:
        """None where sequences are scored: the view runs those forwards by itself, before a batch is formed."""
        layer: int | None = self.config.score_layer
        return layer if self.config.granularity == "batch" else None

    @property
    def _active(self) -> bool:
        """Whether this micro-batch is scored at all."""
        if self.config.granularity == "sequence":
            return False
        return self.auto_off is None or self._burning or self.auto_off.gated()

    def on_step_start(self, step: Step) -> None:
        self._score, self._accepts, self._milliseconds = None, True, 0.0
        self._epoch, self._burning = int(step.epoch), step.global_step < self._core().burn_in
        if self.auto_off is not None and step.is_window_start:
            self.auto_off.begin_window()
        if self.config.granularity == "sequence" and SELECTED not in step.batch:
            raise ConfigError(
                "granularity: sequence trains on the batches of gate.data_view(loader), which this loop does not "
                "use: iterate over them, or set granularity: batch"
            )

    def vote(self, step: Step) -> Tensor | None:
        gate = self._core()
        if step.phase == "batch":
            if LEFT_OUT not in step.batch:
                return None
            gate.skip()
            self._accepts = False
            return torch.tensor(False)
        if WEIGHT in step.batch and step.phase == "forward" and step.logits is not None:
            raise ConfigError(
                "weights of single sequences act inside the chunked head loss: set training.loss: chunked, or "
                "granularity: batch"
            )
        if not self._active:
            if step.phase == "forward" and self.config.granularity == "batch":
                gate.pass_through(int(step.num_tokens))
            return None
        if (step.phase == "partial") != (self.config.score_layer is not None):
            return None
        started = time.perf_counter()
        assert self.anatomy is not None
        seen = evidence.of_step(gate, self.anatomy, step, thins_tokens=self.tokens is not None)
        if self.config.forward == "double":
            evidence.forward_again(step)
        truth = share_of_new(step) if self.config.score == "oracle" else 0.0
        self._score = gate.score(seen, progress=step.global_step / max(1, step.max_steps), truth=truth)
        self._accepts = gate.accept(self._score, optimizer_step=step.global_step)
        self._milliseconds += 1e3 * (time.perf_counter() - started)
        return torch.tensor(self._accepts)

    def _evidence_of_sequences(self, batch: Mapping[str, object]) -> Evidence:
        if self.anatomy is None:
            raise ConfigError("granularity: sequence needs a model: call gate.attach(describe(model))")
        return evidence.of_sequences(self._core(), self.anatomy, batch, self.config.score_layer)

    @property
    def renormalizes(self) -> bool:
        settings: BackwardGateConfig = self.config
        return settings.renormalizes

    @property
    def reads_hidden(self) -> bool:
        return True

    def head_observer(self, step: Step) -> Callable[[HeadChunk], Tensor | None] | None:
        if WEIGHT in step.batch:
            return lambda chunk: step.batch[WEIGHT].to(chunk.loss_C.device)[chunk.row_C]
        if not self._active or self.config.score_layer is not None:
            return None
        sketcher = self._core().sketcher
        sketcher.begin()
        if self.tokens is not None:
            self.tokens.begin(step.generator("backward_gate/tokens"))

        def observe(chunk: HeadChunk) -> Tensor | None:
            started = time.perf_counter()
            weights = self.tokens.weights(chunk) if self.tokens is not None and not self._burning else None
            sketcher.observe(chunk)
            self._milliseconds += 1e3 * (time.perf_counter() - started)
            return weights

        return observe

    def cost(self, step: Step) -> StepCost:
        """The pool's scoring, charged to the batches that it filled; the original's second forward."""
        scored = self._score is not None
        return StepCost(
            forwards=costs.extra_forwards(self.config, step, scored, self._depth),
            heads=costs.extra_heads(self.config, step, scored, self._depth),
        )

    @property
    def _depth(self) -> float:
        """Share of the blocks that a score takes."""
        layer, anatomy = self.config.score_layer, self.anatomy
        return 1.0 if layer is None or anatomy is None else (int(layer) + 1) / int(anatomy.num_blocks)

    def loss_weight(self, step: Step) -> float | Tensor:
        return self._score.weight if self._score is not None else 1.0

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        gate, score = self._core(), self._score
        if score is not None and self.memory is not None:
            self.memory.remember(step.batch["example_id"], self._epoch, self._accepts)
        if score is not None and step.accepted:
            gate.update(score)
            if self.diagnostic is not None and self.anatomy is not None:
                look(self.diagnostic, self.anatomy.model, step, gate, score)
        if self.tokens is not None:
            self.tokens.pool(step.sum_across_ranks)
        if self.auto_off is not None and not self._burning:
            self.auto_off.after(step)
        self._check_once(gate)
        values = reporting.of_micro_batch(score, self._accepts, self._milliseconds)
        if step.should_log and step.is_window_end:
            values |= reporting.totals(gate, self.diagnostic)
        return {name: torch.tensor(value) for name, value in values.items()}

    def summary(self) -> Mapping[str, object]:
        return reporting.summary(self._core(), self.diagnostic, bool(self.auto_off and self.auto_off.off))

    def _check_once(self, gate: Gate) -> None:
        if self._checked or self._burning or int(gate.window.decisions) < DECISIONS:
            return
        self._checked = True
        pairs = (self.diagnostic.correlation(), self.diagnostic.count) if self.diagnostic else (0.0, 0)
        for text in complaints(gate, pairs):
            log.warning("backward_gate: %s", text)
