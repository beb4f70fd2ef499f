"""The strict base of every configuration: unknown keys are errors, values are frozen."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A frozen configuration that forbids unknown keys.

    ``strict`` stays off so that YAML's ``1`` is accepted where a float is meant; a string is never
    accepted where a number is meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
