"""What model, and what adapter on it: the ``model`` and ``lora`` blocks of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

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


class ParallelConfig(StrictConfig):
    """Over how many ranks a frozen base is spread: ``fsdp`` shares of it, ``replicate`` times.

    ``fsdp: 8, replicate: 2`` is sixteen ranks: each eight hold one copy, so that weights travel inside a machine and only
    the small gradients of the adapters between them. Tensor parallelism is refused: a rank would see a part of every
    hidden state where adapters, routers and gates read all of it.
    """

    fsdp: int = Field(default=1, ge=1)
    replicate: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)

    @property
    def ranks(self) -> int:
        return self.fsdp * self.replicate

    @property
    def told(self) -> str:
        return (
            "{"
            + f"fsdp: {self.fsdp}"
            + (f", replicate: {self.replicate}" if self.replicate > 1 else "")
            + "}"
        )

    @model_validator(mode="after")
    def _offered(self) -> ParallelConfig:
        if self.tensor > 1:
            raise ValueError(
                f"tensor={self.tensor}: tensor parallelism is not offered (adapters, routers and gates read whole hidden "
                f"states): shard with fsdp: {self.tensor * self.fsdp}"
            )
        if self.replicate > 1 and self.fsdp == 1:
            raise ValueError(
                f"replicate={self.replicate} repeats a base that is spread over fsdp ranks, and fsdp is 1: without "
                "model.parallel every rank holds the base whole"
            )
        return self


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
    compile: Literal["inductor", "aot_eager", "eager"] | None = None
    """Backend of torch.compile for attention and MLP of every block; ``eager`` only traces, to look for graph breaks."""
    parallel: ParallelConfig | None = None

    @model_validator(mode="after")
    def _sharded_as_it_is(self) -> ModelConfig:
        key = "load_in_4bit" if self.load_in_4bit else "load_in_8bit" if self.load_in_8bit else None
        if self.parallel is not None and self.parallel.ranks > 1 and key is not None:
            raise ValueError(
                f"parallel={self.parallel.told} and {key}: packed weights cannot be spread over ranks: drop one of them "
                "(a 4-bit base is whole on every rank)"
            )
        if self.parallel is not None and self.parallel.ranks > 1 and self.compile is not None:
            raise ValueError(
                f"parallel={self.parallel.told} and compile: {self.compile}: FSDP2 gathers a block's weights in hooks that a "
                "compiled graph would hold on to: drop one of them"
            )
        return self

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
    """The adapter. With ``peft_type`` other than ``lora``, every other key goes to that PEFT config as it is."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    peft_type: str = "lora"
    r: int = Field(default=8, ge=1, le=2**20)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: list[str] | str = "auto"
    layers: Literal["all"] | list[int] | str = "all"
    use_rslora: bool = False
    use_dora: bool = False
    options: dict[str, object] = Field(default_factory=dict)
    """Of another PEFT method: where its keys are gathered, ``r`` and ``target_modules`` too, so that none is left out."""

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, content: object) -> object:
        """The keys of another PEFT method, as its options; what has options already was read before."""
        if not isinstance(content, Mapping) or str(content.get("peft_type", "lora")).lower() == "lora":
            return content
        own = {key: value for key, value in content.items() if key not in ("peft_type", "options")}
        if "options" in content:
            own = {key: value for key, value in own.items() if not cls._is_default(key, value)}
        return {"peft_type": content["peft_type"], "options": {**(content.get("options") or {}), **own}}

    @classmethod
    def _is_default(cls, key: str, value: object) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and bool(field.default == value)

    @model_validator(mode="after")
    def _options_are_another_methods(self) -> LoraConfig:
        if self.options and self.peft_type.lower() == "lora":
            raise ValueError("options are another PEFT method's: set peft_type, or write LoRA's own keys")
        return self
