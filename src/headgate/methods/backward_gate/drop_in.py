"""The gate in a loop that somebody else wrote: the verbs of the original document."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.backward_gate.config import BackwardGateConfig
from headgate.methods.backward_gate.gate import Gate, Score
from headgate.modules.head_sketch import Evidence


def check_sizes(
    config: BackwardGateConfig, d_hidden: int | None, vocab_size: int | None, total_steps: int
) -> None:
    """Raises ConfigError where a loop of one's own leaves out what the trainer would know."""
    if (d_hidden is None) != (vocab_size is None):
        raise ConfigError("BackwardGate in a loop of your own needs both d_hidden= and vocab_size=")
    endless = total_steps == 0 and config.burn_in is None
    if d_hidden is not None and endless and config.target_acceptance < 1:
        raise ConfigError(
            "BackwardGate in a loop of your own needs total_steps= (optimizer steps of the run), of which burn_in is "
            "a tenth, or burn_in= itself: until then every batch is accepted"
        )


class PlainLoop:
    """``embed`` -> ``score`` -> ``accept`` -> ``update``; mixed into BackwardGate.

    ```python
    gate = BackwardGate(d_hidden=768, vocab_size=50257, total_steps=10_000)
    out = model(**batch, output_hidden_states=True)
    z = gate.embed(out.hidden_states[-1], out.logits, batch["labels"])
    if gate.accept(gate.score(z)):
        out.loss.backward(); optimizer.step(); optimizer.zero_grad()
        gate.update(z)
    ```
    The backward is of the same forward: a second one, as in the original, is never needed.
    """

    gate: Gate | None
    _pending: tuple[Evidence, Score] | None = None
    accumulation: int = 1

    def _core(self) -> Gate:
        if self.gate is None:
            raise ConfigError(
                "BackwardGate has no sizes yet: pass d_hidden= and vocab_size= for a loop of your own, "
                "or hand it to HeadgateTrainer, which attaches it"
            )
        return self.gate

    def embed(self, hidden: Tensor, logits: Tensor, labels: Tensor, **options: Any) -> Evidence:
        """The evidence of one micro-batch; labels are *not* shifted, as the model takes them. See Gate.embed."""
        return self._core().embed(hidden, logits, labels, **options)

    def score(self, evidence: Evidence) -> Score:
        """Calibrated score in [0, 1]; changes nothing."""
        score = self._core().score(evidence, progress=self._progress())
        self._pending = (evidence, score)
        return score

    def novelty(self, evidence: Evidence) -> Tensor:
        """Raw gradient novelty (seed name). ``accept`` still decides by the calibrated score."""
        self.score(evidence)
        return self._core().novelty(evidence)

    def accept(
        self, score: Score | Tensor | float | None = None, *, optimizer_step: int | None = None
    ) -> bool:
        """Decide on what was scored last. ``optimizer_step`` is the clock of the burn-in; None counts windows
        of ``accumulation`` offered micro-batches."""
        core = self._core()
        if self._pending is None:
            raise ConfigError("accept() decides on a scored micro-batch: call score(z) or novelty(z) first")
        decided = score if isinstance(score, Score) else self._pending[1]
        step = int(core.offered) // self.accumulation if optimizer_step is None else optimizer_step
        return core.accept(decided, optimizer_step=step)

    def update(self, evidence: Evidence) -> None:
        """Take an accepted micro-batch into the subspace."""
        if self._pending is None or self._pending[0] is not evidence:
            raise ConfigError(
                "update(z) takes the z that was scored last: call score(z), accept, then update(z)"
            )
        self._core().update(self._pending[1])

    def step(self) -> None:
        """Of the original loop. ``accept`` counts by itself, so there is nothing left to do."""

    def acceptance_rate(self) -> float:
        """Accepted share of everything offered so far."""
        return self._core().acceptance_rate()

    def _progress(self) -> float:
        core = self._core()
        return int(core.offered) / (self.accumulation * core.max_steps) if core.max_steps else 0.0
