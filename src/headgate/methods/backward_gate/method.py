"""BackwardGate: the gate as a method of HeadgateTrainer, and as a drop-in for a plain loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headgate.errors import CheckpointError, ConfigError, ModelError
from headgate.methods.backward_gate import policies
from headgate.methods.backward_gate.auto_off import AutoOff
from headgate.methods.backward_gate.checks import DECISIONS, complaints
from headgate.methods.backward_gate.config import BackwardGateConfig
from headgate.methods.backward_gate.diagnostic import ProxyDiagnostic, gradients_of
from headgate.methods.backward_gate.drop_in import PlainLoop
from headgate.methods.backward_gate.gate import Gate, Score
from headgate.methods.backward_gate.memory import ExampleMemory
from headgate.methods.backward_gate.tokens import TokenDraw
from headgate.methods.backward_gate.views import SELECTED, PooledSequences, RememberedRows
from headgate.methods.base import Method, build_config
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.models.surgery import head_bypassed
from headgate.modules.fused_head import HeadChunk, chunked_head_loss
from headgate.modules.head_sketch import Evidence

log = logging.getLogger("headgate")
EARLY = 16


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
    citation = (
        "@misc{slora2024, title={SLoRA: Subspace-Gated LoRA for Token-Efficient Fine-Tuning}, "
        "author={Adib Hasan}, year={2024}}"
    )

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
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        self.seed, self.accumulation, self.max_steps = seed, accumulation, total_steps
        self.gate: Gate | None = None
        self.anatomy: Anatomy | None = None
        self.memory = (
            ExampleMemory(self.config.memory_slots, self.config.rescore_every) if self.config.memory else None
        )
        self.auto_off = AutoOff() if self.config.auto_off else None
        self.diagnostic = self._make_diagnostic()
        self.tokens = (
            TokenDraw(self.config.token_score, self.config.target_acceptance)
            if self.config.score == "token"
            else None
        )
        self.register_buffer("early", torch.zeros(2, dtype=torch.float64))
        self._score: Score | None = None
        self._accepts = True
        self._milliseconds = 0.0
        self._checked = False
        self._began = 0.0
        self._window_losses: list[Tensor] = []
        if total_steps:
            self.check_run(total_steps)
        if (d_hidden is None) != (vocab_size is None):
            raise ConfigError("BackwardGate in a loop of your own needs both d_hidden= and vocab_size=")
        if d_hidden is not None and vocab_size is not None:
            self._build(d_hidden, vocab_size)
            self.to(device) if device is not None else None

    def _make_diagnostic(self) -> ProxyDiagnostic | None:
        wanted = self.config.diagnostic_every and self.config.score in policies.SKETCHING
        return ProxyDiagnostic(self.config.m) if wanted and self.config.m >= 16 else None

    def _build(self, hidden_size: int, vocab_size: int) -> None:
        burn_in = self.config.resolved_burn_in(self.max_steps) if self.max_steps else self.config.burn_in
        self.gate = Gate(
            self.config,
            hidden_size,
            vocab_size,
            seed=self.seed,
            burn_in=2000 if burn_in is None else burn_in,
            max_steps=self.max_steps,
        )

    # -- installation -------------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy) -> None:
        weight = getattr(anatomy.head, "weight", None)
        if weight is None or weight.dim() != 2:
            raise ModelError(
                f"backward_gate reads the head's weight [V, H], which {type(anatomy.head).__name__} does not have"
            )
        layer = self.config.score_layer
        if layer is not None and layer >= anatomy.num_blocks - 1:
            raise ConfigError(
                f"score_layer={layer}: the model has {anatomy.num_blocks} blocks, and stopping after its last saves "
                f"nothing; give 0..{anatomy.num_blocks - 2}, or leave score_layer out"
            )
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
        if max_steps > 0 and burn_in >= max_steps and self.config.target_acceptance < 1:
            raise ConfigError(
                f"burn_in={burn_in} lasts as long as the run ({max_steps} optimizer steps), so it would never gate: "
                f"lower burn_in (default: a tenth of the run) or raise max_steps"
            )
        self.max_steps = max_steps
        if self.gate is not None:
            self.gate.burn_in, self.gate.max_steps = burn_in, max_steps

    def columns(self) -> Sequence[str]:
        return ("example_id",) if self.memory is not None else ()

    def data_view(self, batches: Iterable[Any]) -> Iterable[Any] | None:
        if self.config.granularity == "sequence":
            return PooledSequences(batches, self._core(), self._evidence_of_batch, self.config.pool_factor)
        if self.memory is not None:
            return RememberedRows(batches, self._core(), self.memory, lambda: self._epoch)
        return None

    _epoch = 0

    # -- state --------------------------------------------------------------------------------------
    def structure(self) -> dict[str, Any]:
        gate = self._core()
        sizes = {"d_hidden": gate.sketcher.h_bucket.numel(), "vocab_size": self._vocabulary()}
        return {**super().structure(), **sizes, "seed": gate.seed, "max_steps": gate.max_steps}

    def _vocabulary(self) -> int:
        return int(self._core().settings[1])

    @classmethod
    def from_structure(cls, structure: Mapping[str, Any]) -> BackwardGate:
        return cls(
            build_config(cls.Config, structure["config"]),
            d_hidden=structure["d_hidden"],
            vocab_size=structure["vocab_size"],
            total_steps=structure["max_steps"],
            seed=structure["seed"],
        )

    def restore(self, structure: Mapping[str, Any]) -> None:
        mine = self.structure()
        for key in ("m", "k", "signal", "error", "error_top_k", "basis", "window", "score"):
            old, new = structure["config"].get(key), mine["config"][key]
            if old != new:
                raise CheckpointError(
                    f"backward_gate.{key} was {old!r} in the checkpoint and is {new!r} now: the saved subspace means "
                    "nothing under it; resume with the saved value or start a new run"
                )

    # -- one micro-batch ----------------------------------------------------------------------------
    @property
    def partial_block(self) -> int | None:
        layer: int | None = self.config.score_layer
        return layer

    def on_step_start(self, step: Step) -> None:
        self._score, self._accepts, self._milliseconds = None, True, 0.0
        self._epoch = int(step.epoch)
        if step.is_window_start:
            self._began, self._window_losses = time.perf_counter(), []
        if self.config.granularity == "sequence" and SELECTED not in step.batch:
            raise ConfigError(
                "granularity: sequence forms its batches in the method's data_view, which this trainer does not use: "
                "set granularity: batch, or iterate over gate.data_view(loader) in a loop of your own"
            )

    @property
    def _active(self) -> bool:
        """Whether this micro-batch is gated at all."""
        selected = self.config.granularity == "sequence"
        return not selected and (self.auto_off is None or self._burning or self.auto_off.gated())

    _burning = False

    def vote(self, step: Step) -> Tensor | None:
        gate = self._core()
        self._burning = step.global_step < gate.burn_in
        if step.phase == "batch":
            return self._vote_from_memory(step)
        if not self._active:
            if step.phase == "forward" and self.config.granularity == "batch":
                gate.pass_through(int(step.num_tokens))
            return None
        if (step.phase == "partial") != (self.config.score_layer is not None):
            return None
        started = time.perf_counter()
        if step.phase == "partial":
            evidence = self._evidence_at_block(step)
        elif step.logits is not None:
            evidence = self._evidence_from_logits(step)
        else:
            evidence = gate.sketcher.end()
        evidence = Evidence.unpacked(step.sum_across_ranks(evidence.packed()))
        if self.config.forward == "double":
            self._forward_again(step)
        score = gate.score(evidence, progress=step.global_step / max(1, step.max_steps))
        self._score = score
        self._accepts = gate.accept(score, optimizer_step=step.global_step)
        if float(self.early[1]) < EARLY:
            self.early += torch.tensor([score.seen.novelty, 1.0], dtype=self.early.dtype).to(
                self.early.device
            )
        self._milliseconds += 1e3 * (time.perf_counter() - started)
        return torch.tensor(self._accepts)

    def _vote_from_memory(self, step: Step) -> Tensor | None:
        if self.memory is None or self._burning:
            return None
        kept = (~self.memory.rejects(step.batch["example_id"], self._epoch)).any()
        if bool(step.sum_across_ranks(kept.float().to(step.labels.device)) > 0):
            return None
        self._core().skip()
        self._accepts = False
        return torch.tensor(False)

    def head_observer(self, step: Step) -> Callable[[HeadChunk], Tensor | None] | None:
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

    def loss_weight(self, step: Step) -> float | Tensor:
        return self._score.weight if self._score is not None else 1.0

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        gate, score = self._core(), self._score
        if score is not None and self.memory is not None:
            self.memory.remember(step.batch["example_id"], self._epoch, self._accepts)
        if score is not None and step.accepted:
            gate.update(score)
            self._diagnose(step, score)
        self._try_auto_off(step)
        self._warn_once(gate)
        return self._telemetry(step, gate, score)

    # -- evidence -----------------------------------------------------------------------------------
    def _evidence_from_logits(self, step: Step) -> Evidence:
        if self.tokens is not None:
            raise ConfigError(
                "score: token draws tokens inside the chunked head loss: set training.loss: chunked"
            )
        assert step.hidden is not None and step.logits is not None and self.anatomy is not None
        weight = self.anatomy.head.weight
        assert isinstance(weight, Tensor)
        return self._core().embed(
            step.hidden, step.logits, step.labels, weight=weight.detach(), softcap=self.anatomy.softcap
        )

    @torch.no_grad()
    def _evidence_at_block(self, step: Step) -> Evidence:
        """Score a block's output through the final norm and the head, as if no block followed."""
        assert step.hidden is not None and self.anatomy is not None
        sketcher = self._core().sketcher
        sketcher.begin()
        self._head_loss(self.anatomy.final_norm(step.hidden), step.labels)
        return sketcher.end()

    @torch.no_grad()
    def _evidence_of_batch(self, batch: Mapping[str, Any]) -> Evidence:
        """Per-sequence evidence of a batch of the pool: one forward without a graph, in evaluation mode."""
        if self.anatomy is None:
            raise ConfigError(
                "granularity: sequence needs an attached model: call gate.attach(describe(model))"
            )
        model = self.anatomy.model
        training, device = model.training, self.anatomy.head.weight.device
        inputs = {
            k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")
        }
        model.eval()
        try:
            with head_bypassed(self.anatomy.head) as captured:
                model(**inputs)
        finally:
            model.train(training)
        sketcher = self._core().sketcher
        sketcher.begin(groups=len(batch["labels"]))
        self._head_loss(captured[-1], batch["labels"].to(device))
        return sketcher.end()

    def _head_loss(self, hidden: Tensor, labels: Tensor) -> None:
        assert self.anatomy is not None
        head: Any = self.anatomy.head
        chunked_head_loss(
            hidden,
            head.weight,
            labels,
            bias=getattr(head, "bias", None),
            softcap=self.anatomy.softcap,
            observers=(self._core().sketcher.observe,),
        )

    @torch.no_grad()
    def _forward_again(self, step: Step) -> None:
        """The second forward of the original, for its cost; its result is not used."""
        devices = [step.labels.device] if step.labels.is_cuda else []
        inputs = {k: v for k, v in step.batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
        with torch.random.fork_rng(devices=devices):
            step.model(**inputs)

    # -- after the decision -------------------------------------------------------------------------
    def _diagnose(self, step: Step, score: Score) -> None:
        every = self.config.diagnostic_every
        if self.diagnostic is None or self.anatomy is None or not step.is_window_start:
            return  # later in a window the gradient is a sum that other micro-batches have part in
        if int(self._core().accepted) % every == 0:
            gradients = gradients_of(p for p in self.anatomy.model.parameters() if p.requires_grad)
            if gradients:
                self.diagnostic.look(score.unit_centered, gradients)

    def _try_auto_off(self, step: Step) -> None:
        if self.auto_off is None or self._burning:
            return
        if step.task_loss is not None:
            self._window_losses.append(step.task_loss)
        if step.is_window_end and self._window_losses:
            loss = float(torch.stack(self._window_losses).mean())
            if self.auto_off.add(loss, time.perf_counter() - self._began):
                log.warning(
                    "backward_gate switched itself off (auto_off): loss progress was %.3g per second gated, %.3g ungated",
                    self.auto_off.speed(1),
                    self.auto_off.speed(0),
                )

    def _warn_once(self, gate: Gate) -> None:
        if self._checked or self._burning or int(gate.offered) < gate.burn_in * self.accumulation + DECISIONS:
            return
        self._checked = True
        for text in complaints(gate, (float(self.early[0]), int(self.early[1])), self._proxy()):
            log.warning("backward_gate: %s", text)

    def _proxy(self) -> tuple[float, int]:
        return (
            (self.diagnostic.correlation(), self.diagnostic.count) if self.diagnostic else (float("nan"), 0)
        )

    def _telemetry(self, step: Step, gate: Gate, score: Score | None) -> Mapping[str, Tensor]:
        values: dict[str, float] = {"gate/accept": float(self._accepts)}
        if score is not None:
            values |= {
                "gate/novelty": score.seen.novelty,
                "gate/score": score.value,
                "gate/probability": score.probability,
                "gate/milliseconds": self._milliseconds,
            }
        if step.should_log and step.is_window_end:
            tokens_all, tokens_in = max(1, int(gate.tokens_offered)), max(1, int(gate.tokens_accepted))
            values |= {
                "gate/threshold": float(gate.window.threshold),
                "gate/acceptance_rate": gate.acceptance_rate(),
                "gate/acceptance_rate_recent": float(gate.window.average),
                "gate/accepted_steps": float(gate.accepted),
                "gate/total_steps": float(gate.offered),
                "gate/accepted_tokens": float(gate.tokens_accepted),
                "gate/offered_tokens": float(gate.tokens_offered),
                "gate/loss_all": float(gate.loss_sums[0]) / tokens_all,
                "gate/loss_accepted": float(gate.loss_sums[1]) / tokens_in,
            }
            if self.diagnostic is not None and self.diagnostic.count >= 8:
                values["gate/proxy_correlation"] = self.diagnostic.correlation()
        return {name: torch.tensor(value) for name, value in values.items()}

    def summary(self) -> Mapping[str, Any]:
        gate = self._core()
        correlation, pairs = self._proxy()
        return {
            "offered": int(gate.offered),
            "accepted": int(gate.accepted),
            "without_labels": int(gate.empty),
            "without_forward": int(gate.unforwarded),
            "tokens_offered": int(gate.tokens_offered),
            "tokens_accepted": int(gate.tokens_accepted),
            "acceptance_rate": gate.acceptance_rate(),
            "threshold": float(gate.window.threshold),
            "burn_in": gate.burn_in,
            "proxy_correlation": correlation if pairs >= 8 else None,
            "proxy_pairs": pairs,
            "switched_off": bool(self.auto_off.off) if self.auto_off is not None else False,
        }
