"""What the gate says about itself: telemetry while it runs, figures at the end."""

from __future__ import annotations

from torch import Tensor

from headgate.methods.backward_gate.diagnostic import ProxyDiagnostic
from headgate.methods.backward_gate.gate import Gate, Score


def of_micro_batch(score: Score | None, accepted: bool, milliseconds: float) -> dict[str, float]:
    """Averaged by the trainer over the micro-batches of a logging interval."""
    values = {"gate/accept": float(accepted)}
    if score is not None:
        values["gate/novelty"] = score.seen.novelty
        values["gate/score"] = score.value
        values["gate/probability"] = score.probability
        values["gate/milliseconds"] = milliseconds
    return values


def totals(gate: Gate, diagnostic: ProxyDiagnostic | None) -> dict[str, float]:
    """Counts and rates so far. Losses are means over tokens, of all batches and of the accepted ones."""
    values = {
        "gate/threshold": float(gate.window.threshold),
        "gate/acceptance_rate": gate.acceptance_rate(),
        "gate/acceptance_rate_recent": float(gate.window.average),
        "gate/accepted_steps": float(gate.accepted),
        "gate/total_steps": float(gate.offered),
        "gate/accepted_tokens": float(gate.tokens_accepted),
        "gate/offered_tokens": float(gate.tokens_offered),
        "gate/loss_all": mean_loss(gate.loss_sums[0], gate.tokens_offered),
        "gate/loss_accepted": mean_loss(gate.loss_sums[1], gate.tokens_accepted),
    }
    if diagnostic is not None and diagnostic.count >= 8:
        values["gate/proxy_correlation"] = diagnostic.correlation()
    return values


def mean_loss(total: Tensor, tokens: Tensor) -> float:
    return float(total) / max(1, int(tokens))


def summary(gate: Gate, diagnostic: ProxyDiagnostic | None, switched_off: bool) -> dict[str, object]:
    """JSON figures of a finished run."""
    pairs = diagnostic.count if diagnostic is not None else 0
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
        "proxy_correlation": diagnostic.correlation() if diagnostic is not None and pairs >= 8 else None,
        "proxy_pairs": pairs,
        "switched_off": switched_off,
    }
