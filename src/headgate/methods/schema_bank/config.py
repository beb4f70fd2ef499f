"""Every setting of schema_bank, and the three readings of the original as presets."""

from __future__ import annotations

import warnings
from typing import Literal

from pydantic import Field, model_validator

from headgate.config import Seed, StrictConfig
from headgate.errors import ConfigError
from headgate.methods.stage import Stage
from headgate.ops.reduction import Reduction

Routing = Literal["removed", "on", "all", "dense"]
TagSource = Literal["hash", "hash_pair", "keyword", "cluster", "similarity", "learned", "none"]

ROUTER, BANK, LORA = "schema_router", "schema_bank", "lora"
CURRICULA: dict[str, tuple[tuple[str, tuple[str, ...], float], ...]] = {
    "three": (
        ("router", (ROUTER,), 10.0),
        ("schemas", (BANK, LORA), 1.0),
        ("joint", (ROUTER, BANK, LORA), 0.5),
    ),
    "two": (("schemas", (BANK, LORA), 1.0), ("joint", (ROUTER, BANK, LORA), 0.5)),
    "joint": (("joint", (ROUTER, BANK, LORA), 1.0),),
}
"""Stages as (name, trained groups, peak rate as a multiple of the run's learning rate)."""
SHARES = {"three": (0.25, 0.5, 0.25), "two": (2 / 3, 1 / 3), "joint": (1.0,)}

PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "paper": {
        "attributes": "router",
        "gating": "raw",
        "combine": "add",
        "reduction": "frobenius",
        "tag_schedule": "linear",
    },
    "released": {
        "attributes": "scalar",
        "train_attributes": False,
        "gating": "renormalised",
        "combine": "replace",
        "lambda_tag": 0.0,
        "tag_prefix": True,
        "tags": "hash_pair",
        "tags_per_example": 2,
        "lambda_orth": 1e-4,
        "reduction": "sum",
    },
}
"""What each preset changes. ``paper``: section 3 to the letter, where the letter multiplies; its LoRA sits on the
bank's two blocks only (``lora.layers``). ``released``: what the code ran that produced the published table."""


class SchemaBankConfig(StrictConfig):
    """Options of schema_bank. A value that contradicts a named preset is kept, warned of and recorded.

    Attributes:
        num_schemas, rank, top_k: S, r and k.
        adaptive_mass: the smallest k <= top_k whose probabilities sum to this (None: always top_k).
        layers: ``last_N``, ``all`` or block numbers (negative ones count from the end).
        gating: top-k ``renormalised`` or ``raw`` probabilities; ``dense`` uses every schema.
        combine: ``add`` h + delta (eq. 5), or ``replace`` h by delta (the released code).
        attributes: ``scalar`` output gate, ``router`` input (section 3.3), or ``off``; of size attribute_dim, learned where
            train_attributes says so.
        lambda_tag, lambda_orth, lambda_entropy: weights; the entropy term is mean H(p_t).
        reduction: scale of the orthonormality loss (see ops.low_rank.orthonormality).
        tags: where an example's tag comes from; ``hash_pair`` is the released (h mod S, h div S mod S).
        tags_per_example, tag_seed: schemas that a tag names, and what the tags are drawn from.
        tag_schedule: share of examples that keep their tag over the stage: ``steps``, ``linear``, or a list of
            shares for equal parts.
        permuted_tags: control: tags go to other examples, their distribution unchanged.
        tag_prefix: tagged examples also start with ``[Schema: a,b] ``.
        curriculum: ``three`` stages, ``two`` (no router stage) or ``joint`` from the start.
        stage_shares, stage_steps: lengths of the stages, as shares or in optimizer steps.
        rate_factors: peak rate of each stage as a multiple of the run's learning rate (10, 1, 0.5).
        router, bank: controls: a ``frozen`` random router or bank, or ``uniform`` gates without a router.
        init_std: spread of the bank's first factor at the start.
        removal: how the bank leaves in the last stage: ``abrupt`` (the paper), ``fade``, ``dropout`` or ``distil`` (see
            ``removal``). distil_weight: share of the last stage's loss that is the teacher's.
        eval_routing: what runs at evaluation: ``removed`` (the product), ``on``, ``all`` (eq. 6), ``dense``.
    """

    preset: Literal["default", "paper", "released"] = "default"
    num_schemas: int = Field(default=32, ge=1)
    rank: int = Field(default=16, ge=1)
    top_k: int = Field(default=2, ge=1)
    adaptive_mass: float | None = Field(default=None, gt=0, le=1)
    layers: str | list[int] = "last_2"
    gating: Literal["renormalised", "raw", "dense"] = "renormalised"
    combine: Literal["add", "replace"] = "add"
    attributes: Literal["off", "scalar", "router"] = "off"
    attribute_dim: int = Field(default=32, ge=1)
    train_attributes: bool = True
    lambda_tag: float = Field(default=1.0, ge=0)
    lambda_orth: float = Field(default=1e-2, ge=0)
    lambda_entropy: float = 0.0
    reduction: Reduction = "mean"
    tags: TagSource = "hash"
    tags_per_example: int = Field(default=1, ge=1)
    tag_seed: Seed = 0
    permuted_tags: bool = False
    tag_prefix: bool = False
    tag_schedule: Literal["steps", "linear"] | list[float] = "steps"
    curriculum: Literal["three", "two", "joint"] = "three"
    stage_shares: list[float] | None = None
    stage_steps: list[int] | None = None
    rate_factors: list[float] | None = None
    router: Literal["trained", "frozen", "uniform"] = "trained"
    bank: Literal["trained", "frozen"] = "trained"
    init_std: float = Field(default=0.02, ge=0)
    removal: Literal["abrupt", "fade", "dropout", "distil"] = "abrupt"
    distil_weight: float = Field(default=0.5, gt=0, le=1)
    eval_routing: Routing = "removed"

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        filled = {**PRESETS.get(str(given.get("preset", "default")), {}), **given}
        if filled.get("tags") == "none":
            filled.setdefault("lambda_tag", 0.0)
        if filled.get("tags") == "hash_pair":
            filled.setdefault("tags_per_example", 2)
        if filled.get("num_schemas") == 1:
            filled.setdefault("top_k", 1)
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> SchemaBankConfig:
        if self.top_k > self.num_schemas:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_schemas={self.num_schemas}: lower top_k or add schemas"
            )
        if self.tags == "none" and (self.lambda_tag or self.tag_prefix or self.permuted_tags):
            raise ValueError(
                "tags: none gives no tag source, but lambda_tag, tag_prefix or permuted_tags wants one: "
                "choose tags (hash, keyword, cluster, similarity, learned) or set lambda_tag: 0"
            )
        if self.tags_per_example > self.num_schemas:
            raise ValueError(
                f"tags_per_example={self.tags_per_example} exceeds num_schemas={self.num_schemas}"
            )
        self._check_tag_count()
        if self.removal != "abrupt" and self.eval_routing != "removed":
            raise ValueError(
                f"removal: {self.removal} trains the model for a life without its bank, and eval_routing: "
                f"{self.eval_routing} keeps it: set removal: abrupt, or leave eval_routing out"
            )
        if isinstance(self.tag_schedule, list) and not all(0 <= p <= 1 for p in self.tag_schedule):
            raise ValueError(f"tag_schedule={self.tag_schedule}: every entry is a share between 0 and 1")
        if self.tag_schedule == []:
            raise ValueError("tag_schedule is an empty list: give at least one share")
        if self.stage_shares is not None and self.stage_steps is not None:
            raise ValueError("give stage_shares or stage_steps, not both")
        wanted = len(CURRICULA[self.curriculum])
        for name in ("stage_shares", "stage_steps", "rate_factors"):
            value = getattr(self, name)
            if value is not None and len(value) != wanted:
                raise ValueError(
                    f"{name}={value} has {len(value)} entries, curriculum {self.curriculum!r} has {wanted}"
                )
        if self.stage_shares is not None and abs(sum(self.stage_shares) - 1) > 1e-6:
            raise ValueError(f"stage_shares={self.stage_shares} sum to {sum(self.stage_shares):g}, not 1")
        if isinstance(self.layers, str) and self.layers != "all":
            count = self.layers.removeprefix("last_")
            if count == self.layers or not count.isdigit() or int(count) < 1:
                raise ValueError(
                    f"layers={self.layers!r}: write last_2 (or another number), all, or block numbers"
                )
        if deviations := self.deviations():
            listed = ", ".join(
                f"{k}={v!r} (preset: {PRESETS[self.preset][k]!r})" for k, v in deviations.items()
            )
            warnings.warn(f"schema_bank preset {self.preset!r} is overridden by {listed}", stacklevel=2)
        return self

    def _check_tag_count(self) -> None:
        """A tag source that cannot give as many distinct tags as were asked for says so."""
        if self.tags == "hash_pair" and self.tags_per_example != 2:
            raise ValueError(
                f"tags: hash_pair gives two tags, not tags_per_example={self.tags_per_example}: leave it out, or use tags: hash"
            )
        width = max(1, self.num_schemas // 8)
        if self.tags == "keyword" and self.tags_per_example > width:
            raise ValueError(
                f"tags_per_example={self.tags_per_example} exceeds the {width} schemas of a keyword class (num_schemas / 8): "
                "lower it, or raise num_schemas"
            )

    def deviations(self) -> dict[str, object]:
        """What differs from the named preset; saved with the run."""
        return {k: getattr(self, k) for k, v in PRESETS[self.preset].items() if getattr(self, k) != v}

    def blocks(self, num_blocks: int) -> list[int]:
        """The block numbers that ``layers`` means in a model of ``num_blocks``."""
        if self.layers == "all":
            return list(range(num_blocks))
        if isinstance(self.layers, str):
            count = int(self.layers.removeprefix("last_"))
            if count > num_blocks:
                raise ConfigError(f"layers={self.layers!r}: the model has {num_blocks} blocks: ask for fewer")
            return list(range(num_blocks - count, num_blocks))
        for block in self.layers:
            if not -num_blocks <= block < num_blocks:
                raise ConfigError(
                    f"layers={self.layers}: block {block} is outside the model's 0..{num_blocks - 1}"
                )
        blocks = sorted({block % num_blocks for block in self.layers})
        if len(blocks) != len(self.layers) or not blocks:
            raise ConfigError(f"layers={self.layers}: name every block once, and at least one")
        return blocks

    def stages(self, learning_rate: float) -> list[Stage]:
        """The curriculum as data. A stage whose groups are all frozen by a control is left out."""
        plan = CURRICULA[self.curriculum]
        frozen = {ROUTER: self.router != "trained", BANK: self.bank != "trained", LORA: False}
        made: list[Stage] = []
        shares = self.stage_shares or SHARES[self.curriculum]
        for index, (name, groups, factor) in enumerate(plan):
            factor = self.rate_factors[index] if self.rate_factors else factor
            last = index == len(plan) - 1
            if last and self.removal == "distil":
                groups = (LORA,)  # a bank that only teaches does not train
            train = {group: learning_rate * factor for group in groups if not frozen[group]}
            if not train:
                continue
            supervised = name == "router" or self.curriculum == "joint"
            options = {"tags": supervised and self.router == "trained", "orth": BANK in train}
            if last and self.removal != "abrupt":
                options["removing"] = True
            length = {"steps": self.stage_steps[index]} if self.stage_steps else {"share": shares[index]}
            made.append(Stage(name=name, train=train, options=options, **length))
        if self.stage_steps is None:
            total = sum(stage.share or 0.0 for stage in made)
            made = [stage.model_copy(update={"share": (stage.share or 0.0) / total}) for stage in made]
        return made
