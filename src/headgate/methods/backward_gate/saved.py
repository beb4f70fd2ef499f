"""Which settings a saved gate's state means something under."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headgate.errors import CheckpointError
from headgate.methods.backward_gate.config import BackwardGateConfig


def refuse_changed(saved: Mapping[str, object], mine: Mapping[str, object]) -> None:
    """Raise CheckpointError, naming it, for a setting under which a saved subspace or window means nothing."""
    for key in ("m", "k", "signal", "error", "error_top_k", "basis", "window", "score"):
        if saved.get(key) != mine[key]:
            raise CheckpointError(
                f"backward_gate.{key} was {saved.get(key)!r} in the checkpoint and is {mine[key]!r} now: the saved "
                "state means nothing under it; resume with the saved value or start a new run"
            )


def fingerprint(config: BackwardGateConfig, hidden_size: int, vocab_size: int, seed: int) -> Tensor:
    """What must be equal for a saved subspace to mean the same."""
    kinds = ("head", "backprop", "full", "topk", "frequent_directions", "bisector")
    choices = [kinds.index(c) for c in (config.signal, config.error, config.basis)]
    top_k = config.error_top_k if config.error == "topk" else 0
    return torch.tensor([hidden_size, vocab_size, config.m, config.k, seed, top_k, *choices])
