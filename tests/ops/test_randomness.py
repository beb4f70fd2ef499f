"""Streams of random numbers."""

from __future__ import annotations

import pytest
import torch

from headgate.ops.randomness import seed_device


def test_only_the_streams_of_the_device_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: asked.append(("cuda", seed)))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: asked.append(("mps", seed)))
    with torch.random.fork_rng(devices=[]):
        for device in ("cpu", "cuda", "mps"):
            seed_device(7, torch.device(device))
            assert torch.initial_seed() == 7
    assert asked == [("cuda", 7), ("mps", 7)]
