"""Every setting of layer_routing."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from headgate.config import StrictConfig
from headgate.errors import ConfigError

Policy = Literal[
    "dense", "stochastic_depth", "truncate", "static", "random", "gumbel", "exit", "reinforce", "topk"
]
LEARNED = ("gumbel", "exit", "reinforce", "topk")
MASK_LOGIT = 2.0
"""Size of the logits that gates start at under ``start: mask``: P(open) = .88 in the mask, .12 outside."""
BUDGETED = ("truncate", "static", "random", "gumbel", "exit", "topk")
"""Policies that cannot work below what the always-run blocks cost."""
WHOLE_BLOCKS = ("dense", "stochastic_depth", "truncate", "static")
"""Policies that never close a block for one token and open it for another."""
GRANULARITIES: dict[str, tuple[str, ...]] = {
    "random": ("token", "sample"),
    "gumbel": ("sample", "token"),
    "exit": ("token",),
    "topk": ("token",),
}
"""The first is the default; policies not listed decide for the batch."""


class PatchConfig(StrictConfig):
    """What a closed unit leaves: x + up(gelu(down(norm x))) of this rank, instead of x."""

    rank: int = Field(default=16, ge=1)


AT_MASK: dict[str, object] = {"budget": "exact", "fallback": "mask", "logit_bound": 4.0}
"""What ``start: mask`` sets unless it is given."""
SEED: dict[str, dict[str, object]] = {
    "dense": {},
    "truncate": {},
    "stochastic_depth": {"drop_rate": 0.5, "scaling": False},
    "reinforce": {
        "features": "embedding",
        "budget": "penalty",
        "budget_weight": 0.05,
        "init_keep": 0.5,
        "router_lr": 5e-5,
        "kd": False,
    },
    "gumbel": {
        "granularity": "sample",
        "budget": "penalty",
        "budget_weight": 2 / 18,
        "init_keep": 0.5,
        "router_lr": 3e-5,
    },
}
"""What ``preset: seed`` sets, by policy: the original's costs, rates and starts. Its Gumbel price is 1.0 times the mean
gate of 18 blocks; lambda = 2 / 18 charges the same for all of them under weights that rise from 0 to 1."""


class LayerRoutingConfig(StrictConfig):
    """Options of layer_routing.

    Attributes:
        preset: ``seed``: the original's settings of this policy, where nothing else is given.
        policy: who decides; see docs/methods/layer_routing.md.
        granularity: ``token`` or ``sample``; ``auto`` is the policy's own.
        keep, keep_last: blocks that always run, at the bottom (``auto``: max(1, round(.18 L))) and at the top.
        units: one gate per ``block``, or one for attention and one for the MLP.
        patch: a low-rank map that a closed unit leaves instead of nothing, ``{rank: 16}``; trained as the adapter is.
        kv: keys and values of a block's skipped tokens: ``full`` (made all the same), ``drop`` (absent for the block)
            or ``reuse`` (those of the last block below where the token ran). Training and inference alike.
        features: what the router reads: ``block`` (input of the first routable block), ``embedding``, or ``prepass``
            (the last hidden state of a first forward with adapters and routing off: one forward more).
        prefix_tokens: per-sample routes read the first so many tokens of a document, which run at full depth;
            the route is fixed from then on, so it never sees the future.
        init_keep: P(open) of every gate before training. trunk_gradient: see LayerRouter.
        router_lr: peak learning rate of the router.
        target_utilization: share of all blocks, on real tokens.
        budget: ``lagrangian`` holds the target by a price that rises and falls; ``exact`` (gumbel) opens just so many
            gates of every training batch and needs none; ``penalty`` (weight lambda) and ``target`` (weight kappa) are
            the seed's; ``none``. budget_weight is lambda or kappa; under reinforce lambda is paid per open block.
            dual_step, damping: of the Lagrangian.
        calibrate_to: the utilization that the inference threshold is set to hold; None: the target under
            ``lagrangian`` and ``exact``. Under the others a gate is open where p > .5: depth is what the price made it.
        start: ``open``: every gate at ``init_keep``. ``mask`` (gumbel): the run first trains under random masks of its
            depth, starts its gates at the one that validation then likes best, and goes on with the mask alone where
            routing does not beat it; sets budget exact, fallback mask and logit_bound 4 unless they are given.
        search_share, adapt_share, trial_share: of the run's steps: a trained search (none where ``skip`` names the mask:
            its steps then go to the next phase), training under the mask, and the routing held against that mask.
        logit_bound: logits are bound tanh(z / bound); None: as they are.
        fallback: ``mask``: at every validation the best fixed mask of the depth that is held is searched, and served at
            inference wherever routing does not beat it; the result names which. Costs a forward per block and closed
            block over two batches.
        calibrate_on: what the inference threshold is set on: ``validation`` (the first tokens of every validation set;
            where there is none, of a stream's skills, and with several processes as the other), or ``training`` (a
            running mean over training batches).
        kd: distil from ``teacher``: ``base`` (the same model with adapter and routing off) or ``run:<path>`` (that
            run's LoRA adapter on the same base); kd_weight, kd_temperature, kd_warmup (steps without it). The task
            loss then has weight 1 - kd_weight.
        temperature, temperature_decay, temperature_floor: of the Gumbel gates; decay per epoch, continuously.
            entropy_bonus: weight of the gates' entropy (reinforce, gumbel, exit).
        drop_rate, schedule, scaling: stochastic depth; ``scaling: false`` shows the inference mismatch.
        noise: scale of the logistic noise of Gumbel gates; under ``start: mask`` it falls to 0 over the trial.
        skip: of static and ``start: mask``: the blocks to skip; None has them found by ``search``: ``zero_shot`` (block
            by block, before any training) or ``trained`` (after ``search_share`` of the run under random masks, on
            validation rows).
        train_engine: ``auto`` is sparse where gates have no gradient to lose, masked elsewhere. engine: at inference.
        eval_routing: ``on``, ``removed`` (full depth) or ``shuffled`` (gates permuted over tokens: the control).
    """

    preset: Literal["default", "seed"] = "default"
    policy: Policy = "gumbel"
    granularity: Literal["auto", "batch", "sample", "token"] = "auto"
    keep: int | Literal["auto"] = "auto"
    keep_last: int = Field(default=0, ge=0)
    units: Literal["block", "attention_mlp"] = "block"
    patch: PatchConfig | None = None
    kv: Literal["full", "drop", "reuse"] = "full"
    features: Literal["block", "embedding", "prepass"] = "block"
    prefix_tokens: int = Field(default=16, ge=1)
    init_keep: float = Field(default=0.9, gt=0, lt=1)
    trunk_gradient: bool = False
    router_lr: float = Field(default=1e-3, gt=0)
    target_utilization: float = Field(default=0.75, gt=0, le=1)
    budget: Literal["lagrangian", "exact", "penalty", "target", "none"] = "lagrangian"
    budget_weight: float = Field(default=0.1, ge=0)
    dual_step: float = Field(default=0.01, ge=0)
    damping: float = Field(default=2.0, ge=0)
    calibrate_to: float | None = Field(default=None, gt=0, le=1)
    calibrate_on: Literal["validation", "training"] = "validation"
    fallback: Literal["none", "mask"] = "none"
    start: Literal["open", "mask"] = "open"
    search_share: float = Field(default=0.15, gt=0, lt=1)
    adapt_share: float = Field(default=0.3, ge=0, lt=1)
    trial_share: float = Field(default=0.3, gt=0, lt=1)
    logit_bound: float | None = Field(default=None, gt=0)
    kd: bool = True
    teacher: str = "base"
    kd_weight: float = Field(default=0.5, gt=0, le=1)
    kd_temperature: float = Field(default=2.0, gt=0)
    kd_warmup: int = Field(default=50, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    temperature_decay: float = Field(default=0.95, gt=0, le=1)
    temperature_floor: float = Field(default=0.5, gt=0)
    noise: float = Field(default=1.0, ge=0)
    entropy_bonus: float = Field(default=0.0, ge=0)
    drop_rate: float = Field(default=0.5, ge=0, lt=1)
    schedule: Literal["uniform", "linear"] = "uniform"
    scaling: bool = True
    skip: list[int] | None = None
    search: Literal["zero_shot", "trained"] = "zero_shot"
    train_engine: Literal["auto", "masked", "sparse"] = "auto"
    engine: Literal["sparse", "masked"] = "sparse"
    eval_routing: Literal["on", "removed", "shuffled"] = "on"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: object) -> object:
        """The preset's values, and no distillation where there is no router to teach; what is given wins."""
        if not isinstance(given, dict):
            return given
        policy = given.get("policy", "gumbel")
        filled = {"kd": False, **given} if policy not in LEARNED else given
        if given.get("start") == "mask":
            filled = {**AT_MASK, **filled}
        if given.get("preset") != "seed":
            return filled
        if policy not in SEED:
            raise ValueError(
                f"preset: seed has no policy {policy!r} (it has {', '.join(SEED)}): leave preset out"
            )
        return {**SEED[policy], **filled}

    @model_validator(mode="after")
    def _consistent(self) -> LayerRoutingConfig:
        allowed = GRANULARITIES.get(self.policy, ("batch",))
        if self.granularity != "auto" and self.granularity not in allowed:
            raise ValueError(
                f"policy {self.policy!r} routes per {' or '.join(allowed)}, not per {self.granularity}: "
                "change granularity or leave it out"
            )
        if self.skip is not None and self.policy != "static" and self.start != "mask":
            raise ValueError(
                f"skip lists the blocks of policy static, or of start: mask; policy {self.policy!r} has no use for it"
            )
        if self.kv != "full" and self.policy in WHOLE_BLOCKS:
            raise ValueError(
                f"kv: {self.kv} is about tokens that skip a block which others run; policy {self.policy!r} never does "
                "that: leave kv out"
            )
        if self.patch is not None and self.policy == "dense":
            raise ValueError(
                "patch stands in for a closed block; policy 'dense' closes none: leave patch out"
            )
        if self.fallback == "mask" and (self.policy not in LEARNED or self.calibration_target is None):
            raise ValueError(
                "fallback: mask compares a router with a mask at the depth that its threshold holds: it needs a learned "
                "policy, and budget: lagrangian, exact or calibrate_to"
            )
        self._check_start()
        if self.features == "prepass" and self.policy not in LEARNED:
            raise ValueError(
                f"features: prepass is read by a router; policy {self.policy!r} has none: leave it out"
            )
        if self.teacher != "base" and not self.teacher.startswith("run:"):
            raise ValueError(f"teacher={self.teacher}: give base, or run:<path of a saved run>")
        if self.teacher != "base" and not self.kd:
            raise ValueError(
                f"teacher: {self.teacher} teaches nothing without kd: set kd: true, or leave it out"
            )
        if isinstance(self.keep, int) and self.keep < 1:
            raise ValueError(
                f"keep={self.keep}: at least one block runs before a router has anything to read"
            )
        return self

    def _check_start(self) -> None:
        if self.budget == "exact" and self.policy != "gumbel":
            raise ValueError(
                f"budget: exact opens the highest logits of policy gumbel; policy {self.policy!r} has its own way: leave "
                "it out"
            )
        if self.start == "mask" and (self.budget != "exact" or self.fallback != "mask"):
            raise ValueError(
                f"start: mask needs policy gumbel, budget: exact and fallback: mask (policy {self.policy!r}, budget "
                f"{self.budget}, fallback {self.fallback}): leave budget and fallback out"
            )
        shares = self.search_share + self.adapt_share + self.trial_share
        if self.start == "mask" and shares >= 1 - 1e-9:
            raise ValueError(
                f"search_share, adapt_share and trial_share leave no step to settle in: their sum {shares:g} must be below 1"
            )
        if self.search == "trained" and (self.policy != "static" or self.skip is not None):
            raise ValueError(
                "search: trained finds the mask of policy static where skip names none: leave search or skip out"
            )
        first = abs(math.log(self.init_keep / (1 - self.init_keep)))
        lowest = max(first, MASK_LOGIT) if self.start == "mask" else first
        if self.logit_bound is not None and self.logit_bound <= lowest:
            raise ValueError(
                f"logit_bound={self.logit_bound:g} is not above {lowest:.3g}, the logit that gates start at: raise it"
            )

    @property
    def has_phases(self) -> bool:
        """Whether the run has stages of its own: a trained search, a start at a mask."""
        return self.start == "mask" or self.search == "trained"

    @property
    def calibration_target(self) -> float | None:
        """The utilization that the threshold holds at inference, or None where a gate is open at p > .5."""
        if self.calibrate_to is not None or self.budget not in ("lagrangian", "exact"):
            return self.calibrate_to
        return self.target_utilization

    @property
    def gates_per_block(self) -> int:
        return 2 if self.units == "attention_mlp" else 1

    @property
    def routes_per(self) -> str:
        """``batch``, ``sample`` or ``token``."""
        allowed = GRANULARITIES.get(self.policy, ("batch",))
        return allowed[0] if self.granularity == "auto" else self.granularity

    def routable(self, num_blocks: int) -> range:
        """The blocks that have a gate. Raises ConfigError where none is left, or the target cannot be met."""
        keep = max(1, round(0.18 * num_blocks)) if self.keep == "auto" else self.keep
        blocks = range(keep, num_blocks - self.keep_last)
        if not blocks:
            raise ConfigError(
                f"keep={keep} and keep_last={self.keep_last} leave none of the {num_blocks} blocks to route: lower them"
            )
        always = 1 - len(blocks) / num_blocks
        if self.policy in BUDGETED and self.target_utilization < always:
            raise ConfigError(
                f"target_utilization={self.target_utilization:g} is below {always:.2f}, what the always-run "
                f"{num_blocks - len(blocks)} of {num_blocks} blocks cost alone: raise it, or lower keep"
            )
        for block in self.skip or ():
            if block not in blocks:
                raise ConfigError(
                    f"skip={self.skip}: block {block} is not routable; blocks {blocks.start} to {blocks.stop - 1} are"
                )
        return blocks

    def num_skipped(self, num_blocks: int) -> int:
        """Whole blocks that the depth at inference leaves out, of those that have a gate."""
        depth = self.calibration_target or self.target_utilization
        return min(len(self.routable(num_blocks)), round((1 - depth) * num_blocks))

    def train_engine_for(self) -> str:
        """``masked`` where closed gates need their gradient, unless told otherwise."""
        if self.train_engine != "auto":
            return self.train_engine
        return "masked" if self.policy in ("gumbel", "exit") else "sparse"
