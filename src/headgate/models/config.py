"""What model, and what adapter on it: the ``model`` and ``lora`` blocks of a recipe."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from headgate.config import StrictConfig

ATTENTION = (
    "auto",
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)


class ModelConfig(StrictConfig):
    """The base model. ``name_or_path``: hub id, folder, ``embedded``, ``random:<shape>``, ``random:<config.json>``."""

    name_or_path: str = "embedded"
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    attn_implementation: str = "auto"
    """One of ``ATTENTION``, or a kernel of the hub by name (``owner/name``)."""
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    activation_checkpointing: bool = False

    @field_validator("attn_implementation")
    @classmethod
    def _known_attention(cls, name: str) -> str:
        if name in ATTENTION or "/" in name:
            return name
        close = difflib.get_close_matches(name, ATTENTION, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown attention: {hint}choose one of {', '.join(ATTENTION)}, or owner/name of a hub kernel"
        )


class LoraConfig(StrictConfig):
    """The adapter. With ``peft_type`` other than ``lora``, the remaining keys go to that PEFT config as they are."""

    model_config = ConfigDict(extra="allow")

    peft_type: str = "lora"
    r: int = Field(default=8, ge=1, le=2**20)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: list[str] | str = "auto"
    layers: Literal["all"] | list[int] | str = "all"
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def other_options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})
