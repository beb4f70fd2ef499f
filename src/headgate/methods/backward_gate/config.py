"""Settings of the backward gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from headgate.config import StrictConfig

ScoreKind = Literal[
    "novelty",
    "energy",
    "sketch_norm",
    "oracle",
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

PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "original": {
        "beta": 10.0,
        "basis": "bisector",
        "center": False,
        "rank": False,
        "length_correction": False,
    },
}
"""What each preset changes. ``original``: a sigmoid of slope 10 on raw novelty against a recency tracker."""
RANKABLE = frozenset(
    {
        "novelty",
        "permuted_novelty",
        "energy",
        "sketch_norm",
        "oracle",
        "loss",
        "entropy",
        "grad_norm_bound",
        "consensus",
    }
)
"""Scores whose order means something by itself, so that ``rule: quantile`` can take the top of it."""


class BackwardGateConfig(StrictConfig):
    """Defaults are the specification's; ``preset: original`` fills in the original's rule, keys given beside it win.

    Attributes:
        target_acceptance: share of offered micro-batches that learn, held by the threshold.
        m, k: sketch size, directions of accepted gradients.
        rule: ``sigmoid`` draws with probability sigmoid(beta (score - tau)); ``quantile`` takes the top share of the
            last ``window`` scores, ties by lot (see ops.control.quantile_probability).
        dose: of ``quantile``: ``fixed`` takes target_acceptance; ``adaptive`` as much as stands out of the window (see
            ops.control.outstanding_share), and target_acceptance only where nothing does.
        floor: share of all micro-batches admitted by lot whatever their score. It is part of a fixed dose, and what an
            adaptive one comes on top of.
        beta, ema_rate, window: steepness of the sigmoid, rate of its threshold, scores that a rank is among. On ranks a
            soft sigmoid has a floor of its own: at beta 10 and a target of .30, 23% of acceptances lie below tau.
        burn_in: optimizer steps that always accept; None is min(2000, 10% of the run).
        signal, error, error_top_k: what is sketched (see modules.head_sketch).
        basis, fd_decay, refresh, reorthonormalize_every: see modules.accepted_subspace.
        center, rank, length_correction: the three calibrations; ``rank: false`` compares raw novelty.
        score: novelty; ``energy``, the norm per token of the part of the gradient outside the subspace, which does not
            take exhausted gradients for new ones; or one of the controls that share everything else.
        column, column_values: of ``oracle``: the data column that says which rows are new: those whose value is among
            ``column_values`` (None: those where it is true).
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
            ``sequence`` packs full batches of the sequences selected from a pool; with score_layer the scoring forward
            stops after that block (rows, early).
        auto_off: after 200 gated steps, stop gating if it does not pay in measured seconds.
        diagnostic_every: accepted micro-batches between two looks at the true LoRA gradient; 0 is never.
    """

    preset: Literal["default", "original"] = "default"
    target_acceptance: float = Field(default=0.30, gt=0, le=1)
    m: int = Field(default=512, ge=2)
    k: int = Field(default=64, ge=1)
    rule: Literal["sigmoid", "quantile"] = "sigmoid"
    dose: Literal["fixed", "adaptive"] = "fixed"
    floor: float = Field(default=0.0, ge=0, lt=1)
    beta: float = Field(default=40.0, gt=0)
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
    column: str | None = None
    column_values: list[str | int | bool] | None = None
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
    def _seed_names(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        renamed: dict[str, object] = {}
        for name, value in values.items():
            target = SEED_NAMES.get(str(name), str(name))
            if target in renamed:
                raise ValueError(f"{name} and {target} are the same setting: keep {target}")
            renamed[target] = value
        return {**PRESETS.get(str(renamed.get("preset", "default")), {}), **renamed}

    @model_validator(mode="after")
    def _consistent(self) -> BackwardGateConfig:
        if self.k > self.m:
            raise ValueError(
                f"k={self.k} exceeds m={self.m}: a sketch has no more directions than its size; lower k or raise m"
            )
        self._check_rule()
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
            if clash:
                raise ValueError(f"granularity: sequence cannot be combined with {', '.join(clash)}")
        return self

    def _check_rule(self) -> None:
        if self.rule == "quantile" and self.score not in RANKABLE:
            raise ValueError(
                f"rule: quantile takes the top of an order, which score: {self.score} does not have: use rule: sigmoid, or "
                f"one of {', '.join(sorted(RANKABLE))}"
            )
        if self.dose == "adaptive" and self.rule != "quantile":
            raise ValueError(
                "dose: adaptive is a share of the top scores: set rule: quantile, or leave dose out"
            )
        if self.rule == "sigmoid" and not self.rank and self.score in ("energy", "sketch_norm"):
            raise ValueError(f"score: {self.score} has no scale that a sigmoid could know: keep rank: true")
        if self.floor and self.dose == "fixed" and self.floor >= self.target_acceptance:
            raise ValueError(
                f"floor={self.floor:g} leaves nothing of target_acceptance={self.target_acceptance:g} to choose by score: "
                "lower floor, or use score: random"
            )
        if self.floor and self.score in ("random", "token", "infobatch"):
            raise ValueError(f"floor admits rows by lot, as score: {self.score} does anyway: leave floor out")
        if (self.score == "oracle") != (self.column is not None):
            raise ValueError(
                "score: oracle reads the truth from a data column and no other score does: give both, as in "
                "{score: oracle, column: family, column_values: [farm]}, or neither"
            )
        if self.column_values is not None and self.column is None:
            raise ValueError("column_values are values of a column: name it, as in column: family")

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
