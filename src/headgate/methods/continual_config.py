"""The settings of the baselines of continual learning, apart from them: a recipe is checked before torch is imported."""

from __future__ import annotations

from pydantic import Field

from headgate.config import StrictConfig


class EWCConfig(StrictConfig):
    """``strength``: lambda. ``decay``: gamma, of earlier skills' Fisher. ``beta``: of the running Fisher."""

    strength: float = Field(default=30.0, ge=0)
    decay: float = Field(default=1.0, gt=0, le=1)
    beta: float = Field(default=0.95, ge=0, lt=1)


class AGEMConfig(StrictConfig):
    """``per_skill``: documents kept of each segment. ``rows``: of them in a step's reference gradient."""

    per_skill: int = Field(default=256, ge=1)
    rows: int = Field(default=8, ge=1)


class DERPPConfig(StrictConfig):
    """``alpha``: of the old logits. ``beta``: of the old rows' own loss. ``per_skill``: documents kept of each segment;
    ``rows``: of them in each of a micro-batch's two draws."""

    alpha: float = Field(default=0.1, ge=0)
    beta: float = Field(default=0.5, ge=0)
    per_skill: int = Field(default=256, ge=1)
    rows: int = Field(default=4, ge=1)


class LwFConfig(StrictConfig):
    """``weight``: of the old model's answers. ``temperature``: T, at which they are compared."""

    weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)
