"""Settings of the backward gate."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from headgate.config import StrictConfig

ScoreKind = Literal[
    "novelty",
    "random",
    "loss",
    "loss_floor",
    "novelty_loss_floor",
    "entropy",
    "grad_norm_bound",
    "consensus",
    "infobatch",
    "permuted_novelty",
    "token",
]

SEED_NAMES = {
    "target_novelty": "target_acceptance",
    "target_novelty_scaler": "beta",
    "novelty_scaler": "beta",
    "novelty_ema_rate": "ema_rate",
    "k_topk": "error_top_k",
    "reorth_every": "reorthonormalize_every",
}
"""The names of the original document, accepted everywhere."""


class BackwardGateConfig(StrictConfig):
    """Defaults are the specification's.

    Attributes:
        target_acceptance: share of offered micro-batches that learn, held by the threshold.
        m, k: sketch size, directions of accepted gradients.
        beta, ema_rate, window: steepness of the decision, rate of its threshold, scores that a rank is among.
        burn_in: optimizer steps that always accept; None is min(2000, 10% of the run).
        signal, error, error_top_k: what is sketched (see modules.head_sketch).
        basis, fd_decay, refresh, reorthonormalize_every: see modules.accepted_subspace.
        center, rank, length_correction: the three calibrations; ``rank: false`` compares raw novelty.
        score: novelty, or one of the controls that share everything else.
        loss_floor: for loss_floor and novelty_loss_floor; None means a share of the window instead.
        prune: share of below-mean batches that InfoBatch drops, until ``anneal`` of the run.
        token_score: how the token gate draws tokens.
        replay: ``[accepted, offered]`` of a recorded run: random accepts exactly as many.
        profitability, cost_ratio: the switch of grad_norm_bound; rho = backward / forward cost.
        reweight, max_weight: inverse acceptance probability on the loss, clipped.
        renormalize: gradients of a window divided by its accepted tokens; None: where the accepted losses carry no
            weights of their own. Weighted losses (ipw, infobatch) already sum to the whole window's in
            expectation: dividing again would multiply them by offered / accepted. forward: double repeats the
            original's second forward.
        memory, rescore_every, memory_slots: remember rejected examples over epochs.
        score_layer: decide after this block, through the final norm and head. granularity, pool_factor:
            ``sequence`` packs full batches of the sequences selected from a pool.
        auto_off: after 200 gated steps, stop gating if it does not pay in measured seconds.
        diagnostic_every: accepted micro-batches between two looks at the true LoRA gradient; 0 is never.
    """

    target_acceptance: float = Field(default=0.30, gt=0, le=1)
    m: int = Field(default=512, ge=2)
    k: int = Field(default=64, ge=1)
    beta: float = Field(default=10.0, gt=0)
    ema_rate: float = Field(default=0.01, gt=0, le=0.1)
    window: int = Field(default=256, ge=8)
    burn_in: int | None = Field(default=None, ge=0)
    signal: Literal["head", "backprop"] = "head"
    error: Literal["full", "topk"] = "full"
    error_top_k: int = Field(default=64, ge=1)
    basis: Literal["frequent_directions", "bisector"] = "frequent_directions"
    fd_decay: float = Field(default=1.0, gt=0, le=1)
    refresh: int = Field(default=8, ge=1)
    reorthonormalize_every: int = Field(default=128, ge=1)
    center: bool = True
    rank: bool = True
    length_correction: bool = True
    score: ScoreKind = "novelty"
    loss_floor: float | None = None
    prune: float = Field(default=0.5, gt=0, lt=1)
    anneal: float = Field(default=0.875, gt=0, le=1)
    token_score: Literal["random", "norm"] = "norm"
    replay: tuple[int, int] | None = None
    profitability: bool = False
    cost_ratio: float = Field(default=1.0, gt=0)
    reweight: Literal["none", "ipw"] = "none"
    max_weight: float = Field(default=10.0, ge=1)
    renormalize: bool | None = None
    forward: Literal["single", "double"] = "single"
    memory: bool = False
    rescore_every: int = Field(default=3, ge=1)
    memory_slots: int = Field(default=65536, ge=16)
    score_layer: int | None = Field(default=None, ge=0)
    granularity: Literal["batch", "sequence"] = "batch"
    pool_factor: int = Field(default=4, ge=2)
    auto_off: bool = False
    diagnostic_every: int = Field(default=10, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _seed_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        renamed: dict[str, Any] = {}
        for name, value in values.items():
            target = SEED_NAMES.get(str(name), str(name))
            if target in renamed:
                raise ValueError(f"{name} and {target} are the same setting: keep {target}")
            renamed[target] = value
        return renamed

    @model_validator(mode="after")
    def _consistent(self) -> BackwardGateConfig:
        if self.k > self.m:
            raise ValueError(
                f"k={self.k} exceeds m={self.m}: a sketch has no more directions than its size; lower k or raise m"
            )
        if self.replay is not None:
            accepted, offered = self.replay
            if self.score != "random":
                raise ValueError(f"replay belongs to score: random, not to score: {self.score}")
            if not 0 <= accepted <= offered:
                raise ValueError(
                    f"replay={[accepted, offered]} must be [accepted, offered], accepted <= offered"
                )
        if self.renormalize and self.weighted:
            weights = "reweight: ipw" if self.reweight == "ipw" else "score: infobatch"
            raise ValueError(
                f"renormalize: true over {weights} corrects twice for what was left out: leave renormalize out"
            )
        if self.score == "token" and self.score_layer is not None:
            raise ValueError("score: token acts at the head and takes no score_layer: remove one of them")
        if self.granularity == "sequence":
            clash = [n for n in ("memory", "auto_off") if getattr(self, n)]
            clash += ["score_layer"] if self.score_layer is not None else []
            if clash:
                raise ValueError(f"granularity: sequence cannot be combined with {', '.join(clash)}")
        return self

    @property
    def weighted(self) -> bool:
        """Whether accepted losses are weighted by their inverse acceptance probability."""
        return self.reweight == "ipw" or self.score == "infobatch"

    @property
    def renormalizes(self) -> bool:
        """Whether a window's gradient is divided by what was accepted of it."""
        return not self.weighted if self.renormalize is None else self.renormalize

    def resolved_burn_in(self, max_steps: int) -> int:
        """Optimizer steps that always accept, in a run of ``max_steps``."""
        return min(2000, max_steps // 10) if self.burn_in is None else self.burn_in
