"""Precision and optimizer of a run, as its recipe says: what they are called here, in transformers, and what they need."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Literal

from headgate.errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "paged_lion_8bit", "adafactor", "sgd"
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
OPTIM: dict[str, str] = {
    "adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit", "lion_8bit": "lion_8bit", "paged_lion_8bit": "paged_lion_8bit", "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip
"""transformers' names; adamw is its own default."""
BITSANDBYTES = frozenset(OPTIM) - {"adafactor", "sgd"}
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
}  # fmt: skip
"""What each scheduler takes besides its steps."""
LAUNCHER = "ACCELERATE_MIXED_PRECISION"


def check_arguments(scheduler: str, arguments: dict[str, object]) -> None:
    """Raises ValueError for an argument that the scheduler does not have."""
    known = ARGUMENTS.get(scheduler, ())
    for name in arguments:
        if name not in known:
            has = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"lr_scheduler_args.{name}: {scheduler} has no such argument: {has}")


def check_machine(precision: str, optimizer: str, device: torch.device) -> None:
    """Raises ConfigError where this machine cannot compute so: no such arithmetic, no package, no GPU."""
    import torch

    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("training.precision=fp16 runs on a GPU, model.device is cpu: use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.precision=bf16: this GPU has no bfloat16: use fp16 or fp32")
    if optimizer in BITSANDBYTES and device.type == "cpu":
        raise ConfigError(f"training.optimizer={optimizer} runs on a GPU, model.device is cpu: use adamw")
    if optimizer in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"training.optimizer={optimizer} needs bitsandbytes: pip install bitsandbytes, or use adamw"
        )


def decided_here(precision: str) -> dict[str, object]:
    """TrainingArguments' flags; a launcher that asks for another precision is overruled, and told."""
    wanted = precision if precision in ("bf16", "fp16") else "no"
    asked = os.environ.get(LAUNCHER, "no")
    if asked != wanted:
        if asked != "no":
            warnings.warn(
                f"the launcher asks for mixed precision {asked}, the recipe decides: training.precision={precision}. "
                f"Write training.precision: {asked} to follow the launcher",
                stacklevel=2,
            )
        os.environ[LAUNCHER] = wanted
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}
