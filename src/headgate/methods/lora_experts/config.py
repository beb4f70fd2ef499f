"""Every setting of lora_experts."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from headgate.config import StrictConfig
from headgate.methods.lora_experts.spawn_config import SpawnConfig

BLOCK = re.compile(r"block \d+")


class LoraExpertsConfig(StrictConfig):
    """Options of lora_experts.

    Attributes:
        target_modules: linears with experts; ``auto``: the attention projections of the model's family.
        experts: experts at the start, all mature.
        r, alpha: of the experts at the start. new_r, new_alpha: of those that appear later.
        router: ``learned``; ``prototype`` and ``bayes`` (closed form from each skill's first look, no gradient: what a stream
            without replay needs; the one from mean embeddings, the other from a bigram model of its text, which knows a
            skill by fewer tokens); ``uniform`` (equal gates), ``sum`` (every gate 1, as O-LoRA adds its adapters) and
            ``oracle`` (the expert of the stage's skill alone) are controls without parameters.
        base_prior: a ``bayes`` router leaves to the base what reads like the base's own writing, whose prior is so much of
            a skill's; 0: nothing is left to it.
        router_sites: one router for all linears, or one each.
        features: ``embedding`` (running mean of the document's token embeddings, and the token's own), ``block k``
            (input of block k: experts then sit on the blocks from k on only) or ``prepass`` (final hidden state with
            every adapter off: a second forward).
        granularity: ``token``; ``sequence`` fixes a document's gates after its first ``prefix_tokens`` tokens.
        router_std: of a router row at birth. router_lr: None takes the run's learning rate.
        temperature_start, temperature_min, temperature_half_life: tau = min + (start - min) 2^(-steps / half life),
            counted in accepted steps since the youngest expert's birth.
        maturity_steps: accepted steps over which a new expert's gate ramps up.
        top_k: gates kept of the mature experts; young ones take part beside them. dense_phase: the plan's: all gates are
            kept while an expert is young. top_1_after: accepted steps after the last one matured from which the best
            alone is kept, with its probability among all; None: never.
        balance, z_loss: weights of the load-balancing and z-loss. entropy_token, entropy_mean: weights of
            mean H(p_t), which sharpens, and of -H(mean p), which spreads.
        capacity_factor: C = ceil(factor k T / N) tokens per expert, in training only; None: no limit.
        orthogonality: weight of sum |A_i A_t^T| against frozen experts (O-LoRA).
        kd_weight, kd_temperature: pull a young expert's output towards that of the mature experts together.
        kd_on: ``batch``: on all tokens; ``replayed``: on rows of earlier skills only (``data.replay``), as planned.
        gate_projection: directions of earlier skills' features along which the router no longer changes.
        spawn: when an expert appears; see spawn.py.
        burst: novel documents inside a skill, alike among themselves, that make an expert of their own (watch.py);
            None: only boundaries are looked at. Needs ``spawn.policy: novelty``; one more forward a batch.
        freeze_others: at a new skill, freeze all experts but the one that trains.
        freeze_after: evaluations without gain after which an expert's ``freeze_first`` linears are frozen, and after
            as many again the rest; None: never.
        double_after: steps of which the last evaluation must gain ``double_gain``, or the rank doubles up to
            ``max_rank``; None: never.
        merge_above: at each new skill, first merge experts whose mean cos(dW) is at least this; None: never.
        merge_replay: optimizer steps, at the start of the skill that follows a merge, in which the merged experts train
            too, on what ``data.replay`` brings of their skills; 0: they stay as merged.
        evict: at ``spawn.max_experts`` or ``max_parameters``, remove the least used mature expert to make room.
        max_parameters: of all experts together. pinned: experts that are never evicted or merged.
        combine: the experts' outputs are added up at every linear. The plan's logit mixing is refused by name.
        eval_routing: ``on``, ``removed``, ``arrow`` (every linear routes by its experts' weights),
            ``expert:<number or skill>`` or ``mixture:<number or skill>=<weight>,...``.
    """

    target_modules: list[str] | Literal["auto"] = "auto"
    experts: int = Field(1, ge=1)
    r: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    new_r: int = Field(16, ge=1)
    new_alpha: float = Field(32, gt=0)
    router: Literal["learned", "prototype", "bayes", "uniform", "sum", "oracle"] = "learned"
    base_prior: float = Field(0.1, ge=0, le=1)
    router_sites: Literal["shared", "per_site"] = "shared"
    features: str = "embedding"
    granularity: Literal["token", "sequence"] = "token"
    prefix_tokens: int = Field(32, ge=1)
    router_std: float = Field(1e-2, ge=0)
    router_lr: float | None = Field(None, gt=0)
    temperature_start: float = Field(2.0, gt=0)
    temperature_min: float = Field(0.5, gt=0)
    temperature_half_life: float = Field(200, gt=0)
    maturity_steps: int = Field(200, ge=1)
    top_k: int = Field(2, ge=1)
    dense_phase: bool = False
    top_1_after: int | None = Field(None, ge=0)
    balance: float = Field(0.01, ge=0)
    z_loss: float = Field(1e-3, ge=0)
    entropy_token: float = Field(0.0, ge=0)
    entropy_mean: float = Field(0.0, ge=0)
    capacity_factor: float | None = Field(None, gt=0)
    orthogonality: float = Field(0.0, ge=0)
    kd_weight: float = Field(0.0, ge=0)
    kd_temperature: float = Field(2.0, gt=0)
    kd_on: Literal["batch", "replayed"] = "batch"
    gate_projection: int = Field(0, ge=0)
    spawn: SpawnConfig = Field(default_factory=lambda: SpawnConfig.model_validate({"policy": "always"}))
    burst: int | None = Field(None, ge=2)
    freeze_others: bool = True
    freeze_after: int | None = Field(None, ge=1)
    freeze_first: list[str] = Field(default_factory=list)
    double_after: int | None = Field(None, ge=1)
    double_gain: float = Field(0.01, gt=0, lt=1)
    max_rank: int = Field(32, ge=1)
    merge_above: float | None = Field(None, gt=0, le=1)
    merge_replay: int = Field(0, ge=0)
    evict: bool = False
    max_parameters: int | None = Field(None, ge=1)
    pinned: list[int] = Field(default_factory=list)
    combine: Literal["outputs"] = "outputs"
    eval_routing: str = "on"

    @field_validator("combine", mode="before")
    @classmethod
    def _one_forward(cls, combine: object) -> object:
        if combine == "logits":
            raise ValueError(
                "combine: logits mixes the final logits of every expert alone: N forwards and N key-value caches, "
                "where lora_experts promises one forward; use combine: outputs"
            )
        return combine

    @field_validator("features")
    @classmethod
    def _known_features(cls, features: str) -> str:
        if features in ("embedding", "prepass") or BLOCK.fullmatch(features):
            return features
        raise ValueError(f"features={features!r}: choose embedding, prepass or 'block <k>'")

    @model_validator(mode="after")
    def _consistent(self) -> LoraExpertsConfig:
        if self.temperature_min > self.temperature_start:
            raise ValueError(
                f"temperature_min={self.temperature_min:g} exceeds temperature_start={self.temperature_start:g}: swap them"
            )
        if self.experts > self.spawn.max_experts:
            raise ValueError(
                f"experts={self.experts} exceeds spawn.max_experts={self.spawn.max_experts}: raise the cap"
            )
        learned = self.router == "learned"
        if not learned:
            for key in ("gate_projection", "freeze_after", "entropy_token", "entropy_mean"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key} needs router: learned, and this one is {self.router!r}: leave it out"
                    )
        if self.router_sites == "per_site" and not learned:
            raise ValueError(f"router_sites: per_site needs router: learned, and this one is {self.router!r}")
        if self.router == "bayes" and self.features != "embedding":
            raise ValueError(
                f"features={self.features!r}: router: bayes reads token ids alone, leave features out"
            )
        if self.burst is not None and (self.spawn.policy != "novelty" or self.router == "oracle"):
            raise ValueError(
                f"burst needs spawn.policy: novelty and a router that can find the burst again, not "
                f"{self.spawn.policy!r} with router {self.router!r}: leave it out"
            )
        if self.merge_replay and self.merge_above is None:
            raise ValueError("merge_replay says how long merged experts train: set merge_above too")
        if self.freeze_first and self.freeze_after is None:
            raise ValueError("freeze_first says what freezes first: set freeze_after too")
        return self

    @property
    def first_block(self) -> int:
        """The lowest block that can have experts: the router must have read its features before."""
        return int(self.features.split()[1]) if BLOCK.fullmatch(self.features) else 0

    def feature_width(self, hidden_size: int) -> int:
        """Of what the router reads: mean and token side by side, or one vector. A Bayes router reads no hidden state."""
        if self.router == "bayes":
            return 0
        return (
            2 * hidden_size if self.features == "embedding" and self.granularity == "token" else hidden_size
        )
