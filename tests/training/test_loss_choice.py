"""Which loss a run computes: the whole logits, or a chunk of them at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from headgate.errors import ConfigError
from headgate.training.loss import CHUNKED_FROM_VOCABULARY, choose_loss

FEW, MANY = CHUNKED_FROM_VOCABULARY - 1, CHUNKED_FROM_VOCABULARY


def anatomy(words: int, head: nn.Module | None = None) -> Any:
    return SimpleNamespace(vocab_size=words, head=head or nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("words", "smoothing", "observed", "chosen"),
    [
        (FEW, 0.0, False, "plain"),
        (MANY, 0.0, False, "chunked"),
        (FEW, 0.0, True, "chunked"),
        (FEW, 0.1, False, "chunked"),
    ],
    ids=["a small vocabulary", "a large one", "a method reads the errors", "smoothed labels"],
)
def test_auto_takes_chunks_where_they_are_needed_or_save(
    words: int, smoothing: float, observed: bool, chosen: str
) -> None:
    assert choose_loss("auto", anatomy(words), smoothing, observed) == chosen


def test_a_head_that_is_not_linear_has_no_chunks() -> None:
    other = anatomy(MANY, nn.Identity())
    assert choose_loss("auto", other, 0.0, observed=True) == choose_loss("plain", other, 0.0) == "plain"
    for choice, smoothing in (("chunked", 0.0), ("auto", 0.1)):
        with pytest.raises(ConfigError, match="plain linear head"):
            choose_loss(choice, other, smoothing)


def test_smoothed_labels_need_chunks() -> None:
    assert choose_loss("chunked", anatomy(FEW), 0.1) == "chunked"
    with pytest.raises(ConfigError, match="label_smoothing works with loss: chunked"):
        choose_loss("plain", anatomy(FEW), 0.1)
