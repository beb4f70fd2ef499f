"""Gate: the whole state of the backward gate, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headgate.errors import CheckpointError, ConfigError
from headgate.methods.backward_gate import policies
from headgate.methods.backward_gate.config import BackwardGateConfig
from headgate.methods.backward_gate.policies import Measured
from headgate.methods.backward_gate.saved import fingerprint
from headgate.modules.accepted_subspace import AcceptedSubspace
from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.head_sketch import Evidence, HeadSketcher
from headgate.ops.calibration import centered, running_mean
from headgate.ops.randomness import generator
from headgate.ops.subspace import unit

COUNTERS = ("offered", "accepted", "empty", "unforwarded", "tokens_offered", "tokens_accepted")
EARLY = 16
"""First novelties whose mean is kept, for the checks."""


@dataclass
class Score:
    """A scored micro-batch. ``float(score)`` is the calibrated score in [0, 1].

    Attributes:
        seen: the measurements. raw, corrected: before and after the length correction. value: calibrated.
        probability: of acceptance, were the gate past its burn-in. weight: on the loss, if accepted.
        unit_raw, unit_centered: ``[M]`` unit sketches before and after removal of the running mean.
    """

    seen: Measured
    raw: float
    corrected: float
    value: float
    probability: float
    weight: float
    unit_raw: Tensor
    unit_centered: Tensor

    def __float__(self) -> float:
        return self.value


class Gate(FixedPrecision):
    """Sketch, accepted subspace, calibration, controller and counters: all of it in buffers.

    The cycle is ``evidence`` -> ``score`` (pure) -> ``accept`` (draws; window, mean and threshold move) ->
    ``update`` (accepted only: the subspace). Draws are a function of (seed, micro-batches offered).

    Args:
        config: the settings. hidden_size, vocab_size: of the head. seed: of tables and draws.
        burn_in: optimizer steps that always accept; max_steps: the run's, for annealed rules.
    """

    stays_on_cpu = frozenset({*COUNTERS, "loss_sums", "settings", "early"})
    mean_M: Tensor
    offered: Tensor
    accepted: Tensor
    empty: Tensor
    unforwarded: Tensor
    tokens_offered: Tensor
    tokens_accepted: Tensor
    loss_sums: Tensor
    settings: Tensor
    early: Tensor

    def __init__(
        self,
        config: BackwardGateConfig,
        hidden_size: int,
        vocab_size: int,
        *,
        seed: int = 0,
        burn_in: int = 0,
        max_steps: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.burn_in, self.max_steps = config, seed, burn_in, max_steps
        sketches = config.score in policies.SKETCHING
        self.sketcher = HeadSketcher(
            hidden_size,
            vocab_size,
            config.m,
            signal=config.signal,
            error=config.error,
            error_top_k=config.error_top_k,
            seed=seed,
            wants_sketch=sketches,
            wants_entropy=config.score == "entropy",
            wants_error=config.score == "grad_norm_bound",
        )
        self.subspace = AcceptedSubspace(
            config.m,
            config.k,
            basis=config.basis,
            decay=config.fd_decay,
            refresh=config.refresh,
            reorthonormalize_every=config.reorthonormalize_every,
        )
        self.window = policies.make_window(config)
        self.register_buffer("mean_M", torch.zeros(config.m))
        for name in COUNTERS:
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self.register_buffer("loss_sums", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("early", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("settings", fingerprint(config, hidden_size, vocab_size, seed))

    # -- evidence -----------------------------------------------------------------------------------
    def embed(
        self,
        hidden: Tensor,
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        softcap: float | None = None,
        per_sequence: bool = False,
    ) -> Evidence:
        """Evidence of ``hidden [B, T, H]``, ``logits [B, T, V]`` and *unshifted* labels ``[B, T]``.

        ``weight`` ``[V, H]`` is the head's, needed by ``signal: backprop``. Nothing of size ``[B * T, V]`` is made.
        """
        if self.config.signal == "backprop" and weight is None:
            raise ConfigError("signal: backprop needs the head's weight: pass weight=model.lm_head.weight")
        self.sketcher.begin(hidden.shape[0] if per_sequence else 1)
        self.sketcher.observe_logits(
            hidden.detach(), logits.detach(), labels, weight_VH=weight, softcap=softcap
        )
        return self.sketcher.end()

    def gathered(self, sum_across_ranks: Callable[[Tensor], Tensor] | None = None) -> Evidence:
        """Evidence that the chunked head loss observed, summed over ranks in one small collective."""
        evidence = self.sketcher.end()
        return (
            evidence if sum_across_ranks is None else Evidence.unpacked(sum_across_ranks(evidence.packed()))
        )

    # -- scoring ------------------------------------------------------------------------------------
    def novelty(self, evidence: Evidence) -> Tensor:
        """Raw gradient novelty in [0, 1], uncalibrated; its ceiling for an isotropic sketch is 1 - k/m."""
        return self.subspace.novelty(self._units(evidence)[1])

    def _units(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        raw = unit(evidence.sketch)
        return raw, centered(raw, self.mean_M) if self.config.center else raw

    @torch.no_grad()
    def score(self, evidence: Evidence, *, progress: float = 0.0, truth: float = 0.0) -> Score:
        """Measure and calibrate one micro-batch; changes nothing.

        ``progress``: share of the run done. ``truth``: share of its rows that are new, for ``score: oracle``.
        """
        raw_unit, centered_unit = self._units(evidence)
        numbers = [
            self.subspace.novelty(centered_unit),
            raw_unit @ unit(self.mean_M),
            evidence.tokens,
            evidence.loss,
            evidence.entropy,
            evidence.error_square,
            torch.linalg.vector_norm(evidence.sketch),
        ]
        novelty, alignment, tokens, loss, entropy, square, norm = torch.stack(
            [n.float() for n in numbers]
        ).tolist()
        n = max(1.0, tokens)
        seen = Measured(
            novelty, alignment, tokens, loss / n, entropy / n, (square / n) ** 0.5, norm / n, truth
        )
        kind = self.config.score
        raw = raw_score = policies.raw_score(kind, seen)
        if kind in policies.SKETCHING and self.config.length_correction:
            raw_score = self.window.corrected(raw, tokens)
        if kind == "random":
            raw_score = self._draw("score")
        if kind == "permuted_novelty" and self.window.count:
            raw_score = float(self.window.full[int(self._draw("permutation") * self.window.count)])
        value = self.window.rank(raw_score) if self.config.rank else raw_score
        if self.config.replay is not None:
            p = policies.replay_probability(int(self.accepted), int(self.offered), *self.config.replay)
        else:
            p = policies.probability(self.config, self.window, value, seen, progress, raw_score)
        weight = policies.weight(self.config, p)
        return Score(seen, raw, raw_score, value, p, weight, raw_unit, centered_unit)

    # -- decision -----------------------------------------------------------------------------------
    def accept(self, score: Score, *, optimizer_step: int) -> bool:
        """Decide, and move everything that offered micro-batches move: window, mean, threshold, counters.

        A micro-batch without a labelled token is rejected and counted, and moves nothing else.
        """
        if score.seen.tokens < 1:
            self.empty += 1
            self.offered += 1
            return False
        burning = optimizer_step < self.burn_in
        accepted = burning or self._draw("decision") < score.probability
        if burning:
            score.weight = 1.0
        if self.config.center or self.config.score == "consensus":
            count = int(self.offered - self.empty)
            self.mean_M.copy_(running_mean(self.mean_M, score.unit_raw, count, self.config.ema_rate))
        pushed = score.raw if self.config.score == "permuted_novelty" else score.corrected
        self.window.push(pushed, score.raw, score.seen.loss, score.seen.tokens)
        if not burning and self._controlled:
            self.window.decided(accepted)
        if self.early[1] < EARLY:
            self.early += torch.tensor([score.seen.novelty, 1.0], dtype=torch.float64)
        self.offered += 1
        self.tokens_offered += int(score.seen.tokens)
        self.loss_sums[0] += score.seen.loss * score.seen.tokens
        if accepted:
            self.accepted += 1
            self.tokens_accepted += int(score.seen.tokens)
            self.loss_sums[1] += score.seen.loss * score.seen.tokens
        return bool(accepted)

    def skip(self) -> None:
        """Count a micro-batch that memory rejected before its forward; the controller sees a reject."""
        self.offered += 1
        self.unforwarded += 1
        if self._controlled:
            self.window.decided(False)

    def pass_through(self, tokens: int) -> None:
        """Count a micro-batch that was learned from without being scored."""
        self.offered += 1
        self.accepted += 1
        self.tokens_offered += tokens
        self.tokens_accepted += tokens

    @property
    def _controlled(self) -> bool:
        free = self.config.score in policies.FREE_RUNNING or self.config.replay is not None
        free = free or self.config.rule == "quantile"
        return not free and self.config.target_acceptance < 1

    def update(self, score: Score) -> None:
        """Take the sketch of an accepted micro-batch into the subspace."""
        if self.config.score in policies.SKETCHING and score.seen.tokens >= 1:
            self.subspace.update(score.unit_centered)

    def acceptance_rate(self) -> float:
        """Accepted share of everything offered."""
        return int(self.accepted) / max(1, int(self.offered))

    def _draw(self, purpose: str) -> float:
        stream = generator(self.seed, int(self.offered), f"backward_gate/{purpose}")
        return float(torch.rand((), generator=stream, dtype=torch.float64))

    # -- state --------------------------------------------------------------------------------------
    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: object) -> None:
        saved = state_dict.get(f"{prefix}settings")
        if saved is not None and not torch.equal(saved.cpu(), self.settings):
            raise CheckpointError(
                "the checkpoint's gate was sketched with other settings (sizes, seed, signal, error, basis): its "
                "subspace means nothing under new ones; resume with the saved settings or start a new run"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
