"""What model, and what adapter on it: the ``model`` and ``lora`` blocks of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from headgate.config import StrictConfig


class ModelConfig(StrictConfig):
    """The base model. ``name_or_path``: hub id, folder, ``embedded``, ``random:<shape>``, ``random:<config.json>``."""

    name_or_path: str = "embedded"
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    attn_implementation: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    activation_checkpointing: bool = False


class LoraConfig(StrictConfig):
    """The adapter. With ``peft_type`` other than ``lora``, the remaining keys go to that PEFT config as they are."""

    model_config = ConfigDict(extra="allow")

    peft_type: str = "lora"
    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: list[str] | str = "auto"
    layers: Literal["all"] | list[int] | str = "all"
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def other_options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})
