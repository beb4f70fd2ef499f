"""Laws of sample-level novelty and of the contrastive head."""

from __future__ import annotations

import pytest
import torch

from headgate.errors import ConfigError
from headgate.methods.lora_experts.bursts import NoveltyBuffer, waiting_for_bursts
from headgate.modules.contrastive_head import ContrastiveHead, train_head
from headgate.modules.skill_library import SkillLibrary
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


def test_a_document_waits_only_so_long() -> None:
    buffer = NoveltyBuffer(16, patience=20)
    offer(buffer, 0, range(0, 10))
    offer(buffer, 0, range(10, 19), similarity=1.0)
    assert len(buffer) == 10, "known documents count: 19 were offered since the first came"
    offer(buffer, 0, range(20, 31), similarity=1.0)
    assert len(buffer) == 0 and offer(buffer, 0, range(0, 10)) == 10, "what is gone may come again"


@pytest.mark.parametrize(("share", "found"), [(0.02, False), (0.1, True)])
def test_chance_alone_makes_no_burst_however_long_the_skill(share: float, found: bool) -> None:
    """2% of a known skill's documents look novel, and all of those alike: not so many in a burst's time."""
    stream, buffer, bursts = torch.Generator().manual_seed(0), waiting_for_bursts(16, 32, 0.02), 0
    for batch in range(400):
        unlike = (torch.rand(16, generator=stream) < share).float()
        ids = torch.arange(16) + 16 * batch
        buffer.offer(ids, draws(16, 16, 0.1, centre=0, seed=batch), 1 - unlike, 0.5)
        bursts += buffer.burst(REFERENCE) is not None
    assert (bursts > 0) == found


def test_buffer_survives_saving() -> None:
    buffer, again = (NoveltyBuffer(16, least=8, patience=12) for _ in range(2))
    offer(buffer, 2, range(12))
    again.restore(buffer.structure())
    again.load_state_dict(buffer.state_dict(), strict=True)
    for one in (buffer, again):
        offer(one, 2, range(12, 24), similarity=1.0)
    mine, theirs = buffer.burst(REFERENCE), again.burst(REFERENCE)
    assert mine is None and theirs is None, "both have waited too long"
    for one in (buffer, again):
        offer(one, 2, range(30, 40))
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


def contrasted(*skills: int) -> SkillLibrary:
    made = SkillLibrary(16, contrast=60)
    mix = draws(64, 16, 1.0, seed=99)
    made.set_reference(mix.mean(0), mix)
    for skill in skills:
        made.add(skill, draws(48, 16, 0.3, centre=skill, seed=skill), LONG)
    return made


LONG = torch.full((48,), 60)


def test_a_contrasted_library_knows_its_skills_from_the_first_on() -> None:
    """The mix is something to differ from while there is one skill; every further skill trains the head anew."""
    for skills in ((0,), (0, 1), (0, 1, 2)):
        made = contrasted(*skills)
        thresholds = made.calibrated_thresholds(0.02, 48)
        for place, skill in enumerate(skills):
            again = made.similarities(draws(48, 16, 0.3, centre=skill, seed=50 + skill), LONG)
            assert int(again.argmax()) == place and float(again[place]) >= float(thresholds[place])
        mixed = made.similarities(draws(48, 16, 1.0, seed=98), LONG)
        assert bool((mixed < thresholds).all())


def test_a_contrasted_library_survives_saving_and_removing() -> None:
    made, again = contrasted(0, 1, 2), SkillLibrary(16, contrast=60)
    made.remove(1)
    again.restore(made.structure())
    again.load_state_dict(made.state_dict(), strict=True)
    look = draws(48, 16, 0.3, centre=2, seed=7)
    assert torch.equal(again.similarities(look, LONG), made.similarities(look, LONG))
    for one in (made, again):
        one.add(5, draws(48, 16, 0.3, centre=5, seed=5), LONG)
    assert torch.equal(again.similarities(look, LONG), made.similarities(look, LONG))
    assert torch.equal(again.calibrated_thresholds(0.02, 48), made.calibrated_thresholds(0.02, 48))


def test_a_contrast_keeps_its_precision_and_draws_from_no_global_stream() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made = contrasted(0)
    assert torch.equal(torch.rand(2), expected)
    look = draws(48, 16, 0.3, centre=2, seed=7)
    before = made.similarities(look, LONG)
    assert torch.equal(made.half().similarities(look, LONG), before)
    assert not any(p.requires_grad for p in made.parameters())


def test_a_contrast_without_its_mix_is_refused() -> None:
    with pytest.raises(ConfigError, match="give mix_NH too"):
        SkillLibrary(16, contrast=1).set_reference(torch.zeros(16))
