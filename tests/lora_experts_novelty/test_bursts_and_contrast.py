"""Laws of sample-level novelty and of the contrastive head."""

from __future__ import annotations

import pytest
import torch

from headgate.methods.lora_experts.bursts import NoveltyBuffer
from headgate.modules.contrastive_head import ContrastiveHead, train_head
from headgate.ops.novelty import nt_xent

from .test_novelty import draws

REFERENCE = torch.zeros(16)


def offer(buffer: NoveltyBuffer, skill: int, ids: range, similarity: float = 0.0) -> int:
    embeddings = draws(len(ids), 16, 0.1, centre=skill, seed=ids.start)
    return buffer.offer(torch.tensor(ids), embeddings, torch.full((len(ids),), similarity), 0.5)


def test_a_burst_waits_for_enough_documents_that_are_alike() -> None:
    buffer = NoveltyBuffer(16, least=32)
    assert offer(buffer, 0, range(0, 31)) == 31 and buffer.burst(REFERENCE) is None
    offer(buffer, 1, range(100, 120))  # 51 wait, but no 32 of one kind
    assert buffer.burst(REFERENCE) is None
    offer(buffer, 0, range(31, 33))
    burst = buffer.burst(REFERENCE)
    assert (
        burst is not None
        and sorted(burst.ids.tolist()) == list(range(33))
        and burst.embeddings.shape == (33, 16)
    )
    assert len(buffer) == 20 and buffer.burst(REFERENCE) is None


def test_only_novel_documents_wait_and_none_twice() -> None:
    buffer = NoveltyBuffer(16, capacity=40)
    assert offer(buffer, 0, range(0, 10), similarity=0.5) == 0
    assert offer(buffer, 0, range(0, 10)) == 10 and offer(buffer, 0, range(5, 15)) == 5
    offer(buffer, 0, range(20, 60))
    assert buffer.ids.tolist() == list(range(20, 60))  # the oldest went first


def test_buffer_survives_saving() -> None:
    buffer = NoveltyBuffer(16, least=8)
    offer(buffer, 2, range(12))
    again = NoveltyBuffer(16, least=8)
    again.restore(buffer.structure())
    again.load_state_dict(buffer.state_dict(), strict=True)
    mine, theirs = buffer.burst(REFERENCE), again.burst(REFERENCE)
    assert mine is not None and theirs is not None and torch.equal(mine.ids, theirs.ids)


def test_nt_xent_equals_an_explicit_loop() -> None:
    first, second = (torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(s)), dim=-1) for s in (0, 1))  # fmt: skip
    every, total = torch.cat([first, second]), 0.0
    for i in range(10):
        others = [k for k in range(10) if k != i]
        scores = torch.stack([every[i] @ every[k] / 0.1 for k in others])
        total += float(torch.logsumexp(scores, 0) - every[i] @ every[(i + 5) % 10] / 0.1)
    assert float(nt_xent(first, second, 0.1)) == pytest.approx(total / 10, rel=1e-5)


def test_training_the_head_separates_skills_that_raw_means_do_not() -> None:
    """Skills that differ in a weak direction under a strong common one."""
    skills = []
    for index in range(6):
        samples = draws(64, 16, 0.3, centre=index, seed=index) * 0.3
        samples[:, 15] += 3.0
        skills.append(samples)

    def gap(project) -> float:
        halves = [torch.stack([project(s[i::2].mean(0)) for s in skills]) for i in (0, 1)]
        cosines = (
            torch.nn.functional.normalize(halves[0], dim=-1)
            @ torch.nn.functional.normalize(halves[1], dim=-1).mT
        )
        return float(cosines.diagonal().min() - cosines.fill_diagonal_(-1).max())

    head = ContrastiveHead(16)
    raw = gap(lambda mean: mean)
    losses = train_head(head, skills, steps=150, pairs=6, size=16)
    assert losses[-1] < 0.5 * losses[0]
    assert gap(lambda mean: head(mean).detach()) > 0.3 > raw
    assert losses == train_head(ContrastiveHead(16), skills, steps=150, pairs=6, size=16)


def test_contrast_needs_something_to_contrast() -> None:
    for skills, message in (([draws(64)], "got 1"), ([draws(64), draws(20)], "one of them with 20")):
        with pytest.raises(ValueError, match=message):
            train_head(ContrastiveHead(16), skills)
