"""Randomness as a pure function of (seed, step, purpose).

Every draw comes from a generator derived from what it is for, so that switching a method on changes
neither the data order nor another method's draws, and a resumed run repeats the draws it would have made.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the generated word problems draw without it
    import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings, equal in every process and run."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, step: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The stream of ``purpose`` at ``step``: always the same numbers for the same three arguments."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, step, purpose))


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the global streams that dropout on ``device`` draws from.

    ``torch.manual_seed`` does this for every backend it knows of, present or not, which takes a millisecond.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
