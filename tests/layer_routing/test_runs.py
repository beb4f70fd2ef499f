"""Rows that attend on views of their own keys: whichever rows a step runs, each gets what it gets alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from headgate.models.block_parts import MOST_RUNS, OpenTokens, runs_of

from .conftest import Forced, attach, batch_of, model_of


def test_runs_cover_their_rows_once_and_are_as_few_as_can_be() -> None:
    for size in range(9):
        for rows in itertools.combinations(range(8), size):
            runs = runs_of(rows)
            assert [row for first, count in runs for row in range(first, first + count)] == list(rows)
            assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs)), "neighbours are one run"


def test_the_indices_of_a_step_are_those_of_any_length() -> None:
    """A step takes a short way to its indices: what they take, put and pad is what the long way's do, over two tokens."""
    device = torch.device("cpu")
    for opened in itertools.product((False, True), repeat=4):
        open_B1 = torch.tensor(opened).unsqueeze(1)
        one, two = OpenTokens(open_B1, device), OpenTokens(torch.cat([open_B1, open_B1], 1), device)
        x = torch.randn(4, 2, 3)
        assert torch.equal(one.take(x[:, :1]), two.take(x)[::2])
        assert torch.equal(one.rows_R, two.rows_R) and one.runs == two.runs
        added = torch.randn(len(one), 3)
        wanted = two.put(x, added.repeat_interleave(2, 0))[:, :1]
        assert torch.equal(one.put(x[:, :1], added), wanted)
        assert torch.equal(one.unpad(one.pad(added)), added)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("left", [False, True])
def test_every_choice_of_rows_is_the_masked_engines(family: str, left: bool) -> None:
    """A step of ten rows after a cached prompt, by one run, by several, and by more than are attended one by one."""
    model, _, anatomy = model_of(family)
    method = attach(Forced(keep=1), anatomy)
    model.eval()
    method.eval()
    batch = batch_of(rows=10, left=left, padded=left)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    choices = [[3], [2, 3, 4], [0, 1, 5, 9], list(range(0, 10, 2)), list(range(10)), []]
    assert len(runs_of(choices[3])) > MOST_RUNS >= len(runs_of(choices[2])) > 1
    for rows in choices:
        gates = torch.zeros(10, 1, len(method.blocks))
        gates[rows] = 1.0
        found = {}
        for engine in ("masked", "sparse"):
            method.execution.engine = engine
            with torch.no_grad():
                method.gates = torch.ones(1, 1, len(method.blocks))
                cache = model(**batch, use_cache=True).past_key_values
                method.gates = gates
                found[engine] = model(
                    input_ids=batch["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True
                ).logits  # fmt: skip
        torch.testing.assert_close(found["sparse"], found["masked"], atol=1e-5, rtol=1e-5)
