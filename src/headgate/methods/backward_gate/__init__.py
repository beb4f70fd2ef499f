"""backward_gate: which micro-batches deserve a backward pass (SLoRA, Hasan 2024).

The forward alone shows ``sum_t h_t (x) e_t``, the gradient of the language-model head. A short sketch of it is
compared with the subspace of the gradients learned from before; a batch that adds little is not learned from,
and its backward never runs.

    z = TensorSketch(sum_t h_t (x) e_t),  e_t = softmax(l_t) - onehot(y_t)          modules/head_sketch.py
    novelty = 1 - ||W^T z/|z| ||^2,       W: Frequent Directions of accepted z      modules/accepted_subspace.py
    score = rank of the (centered, length-corrected) novelty in a window            modules/score_window.py
    P(accept) = sigmoid(beta (score - tau)),  tau integrates acceptance - target    ops/control.py

Implemented: all of it, for a plain loop and for HeadgateTrainer; the controls (``score``, see ``policies``);
``memory``, ``score_layer``, ``granularity: sequence``, ``auto_off``; the proxy diagnostic.

Deviates from the original: labels are shifted; the softmax is over the whole vocabulary; the gold token counts
once; the basis is Frequent Directions (``basis: bisector`` is the original's tracker in closed form); scores are
calibrated; the threshold cannot wind up; one forward, never two.

Cost: one pass over each chunk of errors, two FFTs of length m per token, m k per micro-batch, and an
eigenproblem of size 4k at most every ``refresh`` accepted ones. State: about m (5k + 64) numbers.
"""

from typing import TYPE_CHECKING

from headgate.methods.backward_gate.config import BackwardGateConfig

if TYPE_CHECKING:
    from headgate.methods.backward_gate.gate import Gate as Gate
    from headgate.methods.backward_gate.gate import Score as Score
    from headgate.methods.backward_gate.method import BackwardGate as BackwardGate

__all__ = ["BackwardGate", "BackwardGateConfig", "Gate", "Score"]


def __getattr__(name: str) -> object:
    """The method when it is asked for: its settings are checked without torch."""
    if name == "BackwardGate":
        from headgate.methods.backward_gate.method import BackwardGate

        return BackwardGate
    if name in ("Gate", "Score"):
        from headgate.methods.backward_gate import gate

        return getattr(gate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
