"""When an expert appears: the settings, which are checked without torch."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, model_validator

from headgate.config import StrictConfig

POLICY_NAMES = ["novelty", "always", "never", "oracle"]
"""Those of ``spawn``, and what ``register_policy`` adds."""


class SpawnConfig(StrictConfig):
    """When an expert appears. Threshold schedule: clip(base - delta ln(1 + k), threshold_min, base), k experts."""

    policy: str = "novelty"
    """``novelty``, ``always``, ``never``, ``oracle``, or a name given to ``register_policy``."""
    similarity: Literal["max", "median"] = "max"
    """Of the cosines with all experts. The plan's ``median`` calls every skill novel once experts differ."""
    threshold: Literal["fixed", "calibrated"] = "calibrated"
    """``calibrated``: below all but ``false_spawns`` of the similarities that known skills have with themselves."""
    contrast: int = Field(default=0, ge=0)
    """Steps in which a projection head is trained (NT-Xent) at every new skill, on all skills met so far and on text that
    the bare model writes; similarities are then taken between projections. 0: no head."""
    base: float = Field(default=0.75, gt=-1, le=1)
    delta: float = Field(default=0.05, ge=0)
    threshold_min: float = Field(default=0.4, ge=-1, le=1)
    false_spawns: float = Field(default=0.02, gt=0, lt=0.5)
    min_samples: int = Field(default=32, ge=2)
    min_tokens: int = Field(default=2048, ge=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    cooldown: int = Field(default=200, ge=0)
    """Optimizer steps after a spawn in which no unlabelled skill is called novel."""
    gate: Literal["base", "own_loss"] = "base"
    """``base``: an expert that is born is on trial until its segment ends; what it and the older experts take off the base's
    loss on rows kept out of training decides. ``own_loss``: the plan's gate before birth, and no trial for what is novel."""
    loss_ratio: float = Field(default=1.1, ge=0)
    """``gate: own_loss``: spawn only if the best expert's loss exceeds this many times its own loss at maturity."""
    served: float = Field(default=0.9, gt=0, le=1)
    """``gate: base``: an older expert serves a skill if it takes off this share of what the expert on trial takes off."""
    least_gain: float = Field(default=0.02, ge=0, lt=1)
    """``gate: base``: share of the base's loss that an expert must take off to stay."""
    max_experts: int = Field(default=64, ge=1)
    strict: bool = False
    """A skill undecided at its boundary is an error; otherwise its expert's trial decides."""

    @model_validator(mode="after")
    def _checked(self) -> SpawnConfig:
        if self.threshold_min > self.base:
            raise ValueError(
                f"threshold_min={self.threshold_min:g} exceeds base={self.base:g}: lower threshold_min or raise base"
            )
        if self.policy not in POLICY_NAMES:
            close = difflib.get_close_matches(self.policy, POLICY_NAMES, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(POLICY_NAMES)}"
            raise ValueError(f"unknown spawn policy {self.policy!r}: {hint}")
        return self
