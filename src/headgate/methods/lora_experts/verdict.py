"""What becomes of an expert on trial, from losses on the same rows, none of which was trained on.

    gain_i = base - loss_i                     what expert i takes off the base's loss there
    an older expert o serves the skill if      gain_o >= served * gain, and its share of the base's loss is at least
                                               half of what it takes off on its own skill

Losses are only ever compared on the same text: an easy text has a low loss under every expert, and under the base too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

OWN_SHARE = 0.5


class Verdict(Enum):
    WAIT = "wait"
    KEEP = "keep"
    JOIN = "join"
    """An older expert serves the skill: the two become one."""
    DROP = "drop"


@dataclass(frozen=True)
class Evidence:
    """Losses on the rows kept of a skill.

    ``base``: of the model without experts. ``loss``: of the expert on trial, alone. ``others``: of older experts, alone.
    ``own_share``: by older expert, the share of the base's loss that it takes off on its own skills; None: unknown.
    """

    base: float
    loss: float
    others: Mapping[int, float]
    own_share: Mapping[int, float | None]

    @property
    def gain(self) -> float:
        return self.base - self.loss

    @property
    def best(self) -> int | None:
        return min(self.others, key=self.others.__getitem__, default=None)

    @property
    def best_gain(self) -> float:
        return self.base - self.others[self.best] if self.best is not None else 0.0

    def serves(self, served: float) -> bool:
        """Whether the best older expert does what the one on trial does."""
        if self.best is None or self.best_gain < served * self.gain:
            return False
        own = self.own_share.get(self.best)
        return own is None or self.best_gain / self.base >= OWN_SHARE * own

    def __str__(self) -> str:
        ours = f"takes {self.gain:.3f} off the base's loss of {self.base:.3f}"
        return ours if self.best is None else f"{ours}, expert {self.best} takes {self.best_gain:.3f}"

    def as_json(self) -> dict[str, object]:
        others = {str(number): loss for number, loss in self.others.items()}
        return {"base_loss": self.base, "loss": self.loss, "other_losses": others}


def judge(evidence: Evidence, *, served: float, least_gain: float, last: bool) -> Verdict:
    """Before the ``last`` word only an older expert that is at least as good ends a trial: a young one still learns."""
    least = least_gain * evidence.base
    if not last:
        early = evidence.best_gain >= max(evidence.gain, least) and evidence.serves(served)
        return Verdict.JOIN if early and evidence.best_gain > 0 else Verdict.WAIT
    if not evidence.gain >= least:  # nan too: it diverged
        return Verdict.JOIN if evidence.best_gain >= least else Verdict.DROP
    return Verdict.JOIN if evidence.serves(served) else Verdict.KEEP
