"""Where a run tells what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass
class Console:
    """Where a run tells what it does. The command line gives one with a progress bar; the default is silent."""

    say: Callable[[str], None] = lambda _message: None
    callbacks: Sequence[TrainerCallback] = ()
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None
