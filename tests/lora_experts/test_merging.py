"""Laws of merging: what is alike becomes one, weighed by what it served, exact where it can be, and trains on shortly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgate.errors import ConfigError
from headgate.experiments.stream_figure import stream_figure
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.inspect import likeness, timeline
from headgate.methods.lora_experts.merging import clusters, merge, merge_alike
from headgate.ops.expert_merging import cosines, inner_product, merged

from .conftest import SMALL, At, attached, batch_of, logits_of, louden, model_of, stream_stages, trainer_of


def draw(rank: int, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(rank, n, dtype=torch.float64, generator=stream) for n in (7, 5))  # type: ignore[return-value]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 9))
def test_cosines_and_merges_are_those_of_the_whole_matrices(ranks: list[int], seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    experts = [[draw(r, stream) for _ in range(2)] for r in ranks]
    whole = [torch.cat([(up.T @ down).flatten() for down, up in sites]) for sites in experts]
    wanted = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for b in whole]) for a in whole])
    torch.testing.assert_close(cosines(experts), wanted)
    members, weights = [sites[0] for sites in experts], [1.0 / (i + 1) for i in range(len(ranks))]
    target = sum(w * up.T @ down for w, (down, up) in zip(weights, members, strict=True))
    u, s, v = torch.linalg.svd(target)
    for rank in (2, sum(ranks)):
        kept = min(rank, 5)
        best = u[:, :kept] @ torch.diag(s[:kept]) @ v[:kept]
        down, up = merged(members, weights, rank)
        assert down.shape == (rank, 7) and up.shape == (rank, 5)
        torch.testing.assert_close(up.T @ down, best, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(inner_product(members[0], members[1]), whole_inner(members))


def whole_inner(members: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    (a, b), (c, d) = members[:2]
    return ((b.T @ a) * (d.T @ c)).sum()


@pytest.mark.parametrize("router", ["learned", "prototype"])
def test_identical_experts_merge_exactly_and_strangers_stay_apart(router: str) -> None:
    model, anatomy = model_of()
    method = attached(anatomy, experts=3, r=2, router=router)
    for site in method.experts.banks:
        bank = method.experts.bank(site)
        with torch.no_grad():
            for name in ("down", "up"):
                getattr(bank.expert("2"), name).copy_(getattr(bank.expert("1"), name))
    method.experts.roster.infos[1].skills.append("sorting")
    method.experts.roster.infos[2].skills.append("counting")
    if router == "prototype":
        for name in ("0", "1", "2"):
            method.experts.routers.at().learn(name, torch.randn(40, 2 * anatomy.hidden_size))
    batch = batch_of()
    alone = {}
    for number in (0, 1):
        method.set_routing(f"expert:{number}")
        alone[number] = logits_of(model, **batch)
    assert sorted(map(sorted, clusters(method.experts))) == [[0], [1, 2]]
    assert merge_alike(method.experts) == [[1, 2]]
    assert [info.number for info in method.experts.roster] == [0, 1]
    assert method.experts.number_of("counting") == 1
    for number in (0, 1):
        method.set_routing(f"expert:{number}")
        torch.testing.assert_close(logits_of(model, **batch), alone[number], atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="two experts or more"):
        merge(method.experts, [1, 1])
    method.experts.roster.infos[0].pinned = True
    with pytest.raises(ConfigError, match="pinned"):
        merge(method.experts, [0, 1])
    assert sorted(map(sorted, clusters(method.experts, 1e-6))) == [[0], [1]]


def test_all_experts_alike_merge_into_the_same_model() -> None:
    model, anatomy = model_of()
    method = attached(anatomy, experts=2, r=3)
    for site in method.experts.banks:
        bank = method.experts.bank(site)
        with torch.no_grad():
            for name in ("down", "up"):
                getattr(bank.expert("1"), name).copy_(getattr(bank.expert("0"), name))
    before = logits_of(model, **batch_of())
    merge_alike(method.experts)
    assert len(method.experts.roster) == 1
    torch.testing.assert_close(logits_of(model, **batch_of()), before, atol=1e-5, rtol=1e-4)


def test_a_merge_weighs_by_all_that_was_served_and_keeps_the_higher_rank() -> None:
    """Not by the moving usage: at the end of a stream the first skill's is zero, and merging would forget it."""
    _, anatomy = model_of()
    method = attached(anatomy, experts=1, r=2)
    method.experts.add(rank=4)
    louden(method)
    method.experts.current = 7  # neither of them trains
    method.experts.roster.age.copy_(torch.tensor([500, 400]))
    method.experts.roster.served.copy_(torch.tensor([3000.0, 1000.0]))
    method.experts.roster.usage.copy_(torch.tensor([0.0, 1.0]))
    old, new = ([(d.clone(), u.clone()) for d, u in method.experts.factors(n)] for n in (0, 1))
    assert merge(method.experts, [0, 1]) == 1 and method.experts.roster.info(1).rank == 4
    for one, other, (down, up) in zip(old, new, method.experts.factors(1), strict=True):
        wanted = merged([one, other], [0.75, 0.25], 4)
        torch.testing.assert_close(up.T @ down, wanted[1].T @ wanted[0], atol=1e-5, rtol=1e-4)
    assert method.experts.roster.served.tolist() == [4000.0]


def test_what_inspect_says_of_likeness_is_what_merge_above_does() -> None:
    """Just below a join's cosine ``clusters`` has it, just above it does not."""
    _, anatomy = model_of()
    method = attached(anatomy, experts=4, r=2)
    for site in method.experts.banks:
        with torch.no_grad():
            for name in ("down", "up"):
                one, other = (getattr(method.experts.bank(site).expert(n), name) for n in "13")
                other.copy_(0.7 * one + 0.3 * other)
    found = likeness(method.experts)
    assert [row["expert"] for row in found["experts"]] == [0, 1, 2, 3] and len(found["joins"]) == 3
    assert found["joins"][0]["experts"] == [1, 3]
    assert found["joins"][0]["cosine"] == pytest.approx(found["cosines"][1][3])
    for join in found["joins"]:
        assert join["experts"] in [sorted(group) for group in clusters(method.experts, join["cosine"] - 1e-6)]
        assert join["experts"] not in [
            sorted(group) for group in clusters(method.experts, join["cosine"] + 1e-6)
        ]


def test_an_expert_has_served_the_tokens_of_its_own_skill(tmp_path: Path) -> None:
    method = LoraExperts(**SMALL, router="oracle")
    trainer = trainer_of(tmp_path, method, stages=stream_stages(2, ("adding", "sorting")))
    real = {0: 0, 1: 0}
    original = method.on_step_end

    def counted(step: Any) -> Any:
        real[method.experts.current] += int(step.valid.sum())
        return original(step)

    method.on_step_end = counted  # type: ignore[method-assign]
    trainer.train()
    assert method.experts.roster.served.tolist() == list(real.values()) and min(real.values()) > 0
    assert method.experts.roster.usage[0] < method.experts.roster.usage[1]


def test_merged_experts_train_on_for_a_short_replay_and_then_rest(tmp_path: Path) -> None:
    """Two experts made alike are merged at the third skill; the survivor moves for two steps, bitwise still after."""
    method = LoraExperts(**SMALL, router="uniform", merge_above=0.9, merge_replay=2)
    trainer = trainer_of(tmp_path, method, stages=stream_stages(4), save_steps=1)

    def make_alike() -> None:
        with torch.no_grad():
            for site in method.experts.banks:
                one, other = (method.experts.bank(site).expert(n) for n in "01")
                for name in ("down", "up"):
                    getattr(other, name).zero_()[:2].copy_(getattr(one, name))

    kept: dict[int, list[Tensor]] = {}

    def keep(step: int) -> Any:
        return lambda: kept.update(
            {
                step: [
                    b.clone() for s in method.experts.banks for b in (method.experts.bank(s).expert("1").up,)
                ]
            }
        )

    trainer.add_callback(At(step8=make_alike, **{f"step{s}": keep(s) for s in (9, 10, 11, 12)}))
    trainer.train()
    assert [info.number for info in method.experts.roster] == [1, 2] and method.stream.decisions[-1][
        "merged"
    ] == [[0, 1]]
    same = {s: all(map(torch.equal, kept[s], kept[s + 1])) for s in (9, 10, 11)}
    assert same == {9: False, 10: True, 11: True}
    assert method.lifecycle.replaying == [] and all(
        method.experts.bank(s).expert("1").frozen for s in method.experts.banks
    )


def test_a_short_replay_without_rows_to_replay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set merge_above too"):
        LoraExperts(merge_replay=3)
    assert LoraExperts(merge_above=0.9, merge_replay=3).needs_replay == "merge_replay"
    assert LoraExperts(kd_weight=1.0, kd_on="replayed").needs_replay == "kd_on: replayed"
    assert LoraExperts().needs_replay is None


def test_the_timeline_says_who_came_who_went_and_to_whom() -> None:
    """A birth kept, one handed over, a merge, an eviction that nobody announced; and only what is known is told."""
    decisions = [
        {"step": 0, "kind": "known", "expert": 0, "reason": "first", "skill": "a"},
        {"step": 9, "kind": "novel", "expert": 1, "reason": "new", "skill": "b"},
        {
            "step": 14,
            "kind": "kept",
            "expert": 1,
            "trial": 1,
            "reason": "it gains",
            "base_loss": 3.0,
            "loss": 2.0,
        },
        {"step": 18, "kind": "undecided", "expert": 2, "reason": "near", "skill": None},
        {"step": 22, "kind": "handed over", "expert": 0, "trial": 2, "reason": "served"},
        {"step": 27, "kind": "novel", "expert": 3, "reason": "new", "skill": "c", "merged": [[0, 1]]},
        {"step": 36, "kind": "novel", "expert": 4, "reason": "new", "skill": "d", "merged": []},
    ]
    left = [{"expert": 0, "skills": ["a", "b"]}, {"expert": 4, "skills": ["d"]}]
    found = timeline(decisions, left)
    lives = {
        life["expert"]: (life["from"], life["until"], life["heir"], life["here"]) for life in found["lives"]
    }
    assert lives == {
        0: (0, None, None, True),
        1: (9, 27, 0, False),
        2: (18, 22, 0, False),
        3: (27, None, None, False),
        4: (36, None, None, True),
    }
    assert found["served"] == {"a": 0, "b": 0, "d": 4}
    assert [e["what"] for e in found["events"]] == [
        "known", "novel", "kept", "undecided", "handed over", "merged", "novel", "novel",
    ]  # fmt: skip
    assert found["events"][2]["base_loss"] == 3.0 and found["events"][4]["into"] == 0
    axes = stream_figure(found).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0: a, b", "1", "2", "3", "4: d"]
    assert stream_figure(timeline([], left)).axes[0].get_yticklabels() == []
