"""The ideal that routed decoding is held against: what is left out is worth what the plain model takes for it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headgate.experiments.benchmarks.rows_ideal import STEPS, lengths, plain_arms, row_counts, saved


def test_what_is_saved_is_the_time_of_the_tokens_left_out() -> None:
    """Blocks whose time is 5 + n: a fixed part, which only a closed block saves, and a part by the token."""
    blocks, batch, prompt = 4, 8, 16
    measured = {}
    for kind, sizes, calls in (
        ("prompt", {n: n * batch for n in lengths(prompt)}, 1),
        ("step", {n: n for n in row_counts(batch)}, STEPS),
    ):
        for number, tokens in sizes.items():
            for depth in (blocks, 1):
                measured[f"{kind} {number}, {depth}"] = [calls * (100 + depth * (5.0 + tokens))] * 3

    def worth(opened: list[list[int]]) -> float:
        return saved(measured, opened, (batch, prompt), blocks, 0.1)[0]

    everything = [[batch * prompt] * 3, [batch] * 3, [batch] * 3]
    assert worth(everything) == pytest.approx(0)
    assert worth([everything[0], [4, 8, 8], [8, 8, 3]]) == pytest.approx(4 + 5)
    assert worth([[64, 128, 128], [8] * 3]) == pytest.approx(64)
    assert worth([everything[0], [0, 8, 8]]) == pytest.approx(0.9 * (5 + 8)), "keys and values are still made"
    assert worth([[100, 128, 128]]) == pytest.approx(28), "between two measured lengths"


def test_the_plain_arms_leave_the_model_and_their_caches_as_they_were() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ran: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    arms = plain_arms(model, torch.randint(3, 30, (2, 8)))
    for name, work in arms.items():
        for _ in range(2):  # the cache is cut back: a second round is the first
            ran.clear()
            work()
            depth = int(name.split(", ")[1])
            assert ran == list(range(depth)) * (STEPS if name.startswith("step") else 1)
    assert model.config.num_hidden_layers == 3
