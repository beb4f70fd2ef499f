"""Laws of trials: what a segment trains harms no older skill, and stays only if rows that nothing trained on say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from headgate.data.collation import Collator
from headgate.methods.documents import document_ids, document_lengths, documents_in, labels_without
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.merging import merge
from headgate.methods.lora_experts.verdict import Evidence, Verdict, judge
from headgate.methods.stage import Stage
from headgate.training.accounting import forward_flops

from .conftest import At, attached, model_of, resumed, state_of, trainer_of
from .test_bursts_in_training import WORDS, rows_of

WORDS |= {"counting": range(300, 303), "naming": range(900, 903)}
OPTIONS: dict[str, Any] = {
    "r": 2,
    "alpha": 4,
    "new_r": 3,
    "new_alpha": 6,
    "maturity_steps": 3,
    "router": "prototype",
}
NOVELTY = {"policy": "novelty", "min_samples": 12, "min_tokens": 64, "cooldown": 0}
Part = tuple[str, bool, int, int]
"""Skill, labelled, steps, rows."""


def stream_of(folder: Path, *parts: Part, spawn: dict[str, Any] | None = None, **options: Any) -> Any:
    method = LoraExperts(**{**OPTIONS, **options, "spawn": {**NOVELTY, **(spawn or {})}})
    stages = [
        Stage(name=f"{i}", steps=steps, train={}, data=f"{i}", options={"skill": skill, "labelled": labelled})
        for i, (skill, labelled, steps, _) in enumerate(parts)
    ]
    rows = {f"{i}": Dataset.from_list(rows_of(skill, n, i)) for i, (skill, _, _, n) in enumerate(parts)}
    return trainer_of(folder, method, stages=stages, rows=rows)


def factors_of(method: LoraExperts, number: int) -> list[Tensor]:
    return [t.detach().clone() for part in method.experts.parts(number) for t in (part.down, part.up)]


def loss_of(method: LoraExperts, number: int | None, skill: str) -> float:
    return method.routed.loss_alone(number, [Collator(0)(rows_of(skill, 16, 99))])


def kinds(method: LoraExperts) -> list[str]:
    return [decision["kind"] for decision in method.stream.decisions]


# -- the verdict ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "loss", "other", "own_share", "last", "verdict"),
    [
        (1.591, 1.2, 2.254, 0.4, True, Verdict.KEEP),  # an easy text: the older expert is worse than the base
        (
            4.0,
            3.0,
            3.05,
            0.25,
            True,
            Verdict.JOIN,
        ),  # it does nearly as much, and nearly what it does for its own
        (4.0, 3.0, 3.05, 0.8, True, Verdict.KEEP),  # it does far more for its own skill
        (4.0, 3.0, 3.5, 0.2, True, Verdict.KEEP),
        (4.0, 3.98, 4.2, 0.2, True, Verdict.DROP),  # nothing was learned
        (4.0, 3.98, 3.5, 0.9, True, Verdict.JOIN),  # somebody must serve it
        (4.0, float("nan"), 4.2, 0.2, True, Verdict.DROP),
        (4.0, 3.6, 3.5, 0.2, False, Verdict.JOIN),  # half-way, and it is behind
        (4.0, 3.0, 3.05, 0.2, False, Verdict.WAIT),
    ],
)
def test_verdicts(
    base: float, loss: float, other: float, own_share: float, last: bool, verdict: Verdict
) -> None:
    evidence = Evidence(base, loss, {0: other}, {0: own_share})
    assert judge(evidence, served=0.9, least_gain=0.02, last=last) is verdict


def test_a_verdicts_reason_names_the_best_older_expert_where_there_is_one() -> None:
    alone = "takes 0.500 off the base's loss of 2.000"
    assert str(Evidence(2.0, 1.5, {}, {})) == alone
    assert str(Evidence(2.0, 1.5, {3: 1.75, 5: 1.9}, {})) == f"{alone}, expert 3 takes 0.250"


# -- the audit's streams ----------------------------------------------------------------------------------------
def test_an_easy_text_gets_its_own_expert(tmp_path: Path) -> None:
    """Finding 1: an expert of high losses must not serve what the base does better alone."""
    trainer = stream_of(tmp_path, ("adding", True, 8, 64), ("sorting", True, 8, 64))
    (method,) = trainer.methods
    method.experts.roster.loss_at_maturity.fill_(100.0)  # under the plan's gate it serves everything
    kept: list[list[Tensor]] = []
    trainer.add_callback(At(step8=lambda: kept.append(factors_of(method, 0))))
    trainer.train()
    assert kinds(method) == ["known", "novel", "kept"] and len(method.experts.roster) == 2
    assert all(map(torch.equal, kept[0], factors_of(method, 0)))


def test_a_cooldown_trains_no_segment_into_somebody_elses_expert(tmp_path: Path) -> None:
    """Finding 2: four unlabelled skills, the default cooldown, an expert each."""
    skills = ("adding", "sorting", "counting", "naming")
    trainer = stream_of(tmp_path, *[(s, False, 8, 64) for s in skills], spawn={"cooldown": 200})
    trainer.train()
    (method,) = trainer.methods
    assert kinds(method) == ["known", "novel", "kept", "undecided", "kept", "undecided", "kept"]
    for number, skill in enumerate(skills):
        losses = {n: loss_of(method, n, skill) for n in range(4)}
        assert min(losses, key=losses.__getitem__) == number


def test_a_named_skill_of_few_rows_trains_no_foreign_expert(tmp_path: Path) -> None:
    """Finding 3: what there is too little of is undecided, and trains an expert of its own; no prototype moves."""
    trainer = stream_of(tmp_path, ("adding", True, 8, 64), ("sorting", True, 8, 7), ("sorting", True, 4, 7))
    (method,) = trainer.methods
    kept: dict[str, Any] = {}

    def look() -> None:
        kept["factors"], kept["prototype"] = (
            factors_of(method, 0),
            method.stream.library.prototypes_KH[0].clone(),
        )

    trainer.add_callback(At(step8=look))
    trainer.train()
    assert kinds(method)[:3] == ["known", "undecided", "kept"]
    assert all(map(torch.equal, kept["factors"], factors_of(method, 0)))
    assert torch.equal(kept["prototype"], method.stream.library.prototypes_KH[0])
    assert method.stream.decisions[3]["kind"] == "known" and method.stream.decisions[3]["expert"] == 1


def test_over_the_cap_nothing_is_trained_into_an_older_expert(tmp_path: Path) -> None:
    """Finding 3, at ``max_experts``: the expert on trial is merged where that harms nobody, or goes; never kept."""
    trainer = stream_of(
        tmp_path,
        *[(s, True, 8, 64) for s in ("adding", "sorting", "counting")],
        spawn={"max_experts": 2},
    )
    (method,) = trainer.methods
    before: dict[str, float] = {}

    def look() -> None:
        before.update(adding=loss_of(method, 0, "adding"), sorting=loss_of(method, 1, "sorting"))

    trainer.add_callback(At(step16=look))
    trainer.train()
    assert kinds(method)[:4] == ["known", "novel", "kept", "capped"]
    assert kinds(method)[4] in ("merged", "handed over", "dropped")
    assert [info.number for info in method.experts.roster] == [0, 1]
    for number, skill in enumerate(("adding", "sorting")):
        assert loss_of(method, number, skill) <= before[skill] * 1.02


def test_a_merge_keeps_names_prototypes_and_maturity_and_ends_no_run() -> None:
    """Finding 4: the last mature expert merges into the one in training, and nothing of it is lost."""
    _, anatomy = model_of()
    method = attached(anatomy, experts=1, r=2, router="prototype")
    young = method.experts.add(rank=2, skills=["sorting"])
    method.experts.current = young
    method.experts.roster.infos[0].skills.append("adding")
    library, width = method.stream.library, anatomy.hidden_size
    for number, name in ((0, "adding"), (1, "sorting")):
        library.add(number, torch.randn(4, width), torch.ones(4), name)
        method.experts.routers.at().learn(str(number), torch.randn(40, 2 * width) + number)
    logits = method.experts.routers.at()(torch.randn(9, 2 * width), ["0", "1"])
    assert merge(method.experts, [0, 1]) == young
    assert method.experts.mature() == [young] and method.experts.number_of("adding") == young
    assert library.experts == [young, young] and library.names == ["adding", "sorting"]
    assert method.experts.routers.at().owners == ["1", "1"] and logits.shape[-1] == 2


def test_the_closed_form_router_learns_every_skill_of_an_expert(tmp_path: Path) -> None:
    """Finding 5: tokens of an expert's second skill reach it; a skill that returns is not entered twice."""
    _, anatomy = model_of()
    method = attached(anatomy, experts=3, router="prototype", **{"spawn": NOVELTY})
    stream = method.stream
    batches = {s: [Collator(0)(rows_of(s, 16, 1))] for s in WORDS}
    for number, skill in ((0, "adding"), (1, "sorting"), (0, "counting"), (2, "naming")):
        stream.introduce(number, batches[skill], new=True)
    stream.introduce(0, batches["adding"], new=False)
    router = method.experts.routers.at()
    assert router.owners == ["0", "1", "0", "2"]
    for skill, expert in (("adding", 0), ("sorting", 1), ("counting", 0), ("naming", 2)):
        features = method.routed.features_of([Collator(0)(rows_of(skill, 16, 9))])
        assert float((router(features, ["0", "1", "2"]).argmax(-1) == expert).float().mean()) > 0.95


def test_an_eviction_takes_its_statistics_along() -> None:
    """Finding 6: what is left is the router that never met the skill."""
    _, anatomy = model_of()
    stream = torch.Generator().manual_seed(0)
    width = 2 * anatomy.hidden_size
    looks = [torch.randn(60, width, generator=stream) * (1 + 5 * n) + n for n in range(3)]
    routers = []
    for met in ((0, 1, 2), (0, 2)):
        method = attached(anatomy, experts=3, router="prototype")
        for n in met:
            method.experts.routers.at().learn(str(n), looks[n])
        if 1 in met:
            method.experts.evict(1)
        routers.append(method.experts.routers.at())
        method.detach()
    x = torch.randn(9, width, generator=stream)
    torch.testing.assert_close(routers[0](x, ["0", "2"]), routers[1](x, ["0", "2"]))


# -- the guard of older experts ---------------------------------------------------------------------------------
def test_an_older_expert_that_gets_worse_gets_its_factors_back(tmp_path: Path) -> None:
    """Bitwise; and the rest of the segment trains nothing."""
    trainer = stream_of(tmp_path, ("adding", True, 8, 64), ("adding", True, 8, 64))
    (method,) = trainer.methods
    kept: dict[int, Any] = {}

    def look(step: int) -> Any:
        return lambda: kept.update({step: factors_of(method, 0)})

    def harm() -> None:
        with torch.no_grad():
            for part in method.experts.parts(0):
                part.up.mul_(-3)

    trainer.add_callback(At(step8=look(8), step10=harm, step13=look(13), step16=look(16)))
    trainer.train()
    assert all(map(torch.equal, kept[8], kept[13])) and all(map(torch.equal, kept[13], kept[16]))
    assert any("factors back" in str(row.get("stage")) for row in trainer.state.log_history)


def test_kept_rows_train_nothing(tmp_path: Path) -> None:
    """Their labels are out of every batch, and the loss is that of the others."""
    trainer = stream_of(tmp_path, ("adding", True, 12, 20))
    (method,) = trainer.methods
    original, masked = method.vote, [0]

    def watched(step: Any) -> Any:
        ids = document_ids(documents_in(step.batch))
        held = torch.isin(ids, method.trial.rows.ids)
        assert bool((step.batch["labels"][held] == -100).all()) and bool(
            (step.batch["labels"][~held] != -100).any()
        )
        masked[0] += int(held.sum())
        return original(step)

    method.vote = watched
    trainer.train()
    assert masked[0] > 0 and len(method.trial.rows) == 4


def test_a_gradient_is_divided_by_the_tokens_that_train(tmp_path: Path) -> None:
    """A window's tokens are those of its micro-batches after the kept rows are out, from the segment's first step on."""
    trainer = stream_of(tmp_path, ("adding", True, 6, 20), ("counting", True, 6, 20))
    (method,) = trainer.methods
    seen: dict[int, list[int]] = {}
    original = method.vote

    def watched(step: Any) -> Any:
        if step.phase == "batch":
            seen.setdefault(step.global_step, [int(step.window_tokens), 0])[1] += int(step.num_tokens)
        return original(step)

    method.vote = watched
    trainer.train()
    assert len(seen) == 12 and all(window == trained for window, trained in seen.values())


def test_the_last_step_of_a_guarded_segment_trains_and_is_judged(tmp_path: Path) -> None:
    """Good, it stays; bad, the factors come back before the segment is validated. No boundary follows it."""
    for harmful in (False, True):
        trainer = stream_of(tmp_path / str(harmful), ("adding", True, 8, 64), ("adding", True, 8, 64))
        (method,) = trainer.methods
        kept: dict[int, Any] = {}

        def look(step: int, kept: dict[int, Any] = kept, method: Any = method) -> Any:
            return lambda: kept.update({step: factors_of(method, 0)})

        def harm(method: Any = method) -> None:
            with torch.no_grad():
                for part in method.experts.parts(0):
                    part.up.mul_(-3)

        trainer.add_callback(At(step12=look(12), step15=look(15), step16=harm if harmful else look(16)))
        trainer.train()
        after = factors_of(method, 0)
        if harmful:
            assert all(map(torch.equal, kept[12], after)), "what half-way was found good"
            assert "factors back" in kinds(method)
        else:
            assert not all(map(torch.equal, kept[15], kept[16])), "the last step trained"
            assert all(map(torch.equal, kept[16], after))


def test_a_boundarys_forwards_are_in_the_account(tmp_path: Path) -> None:
    """The same stream with and without looks: what is read besides the steps costs what its tokens cost."""
    read: list[Any] = []
    trainer = stream_of(tmp_path, ("adding", True, 4, 20), ("counting", True, 4, 20))
    (method,) = trainer.methods
    taken = method.routed.readings.take
    method.routed.readings.take = lambda: read.extend(found := taken()) or found
    trainer.train()
    counted, total = sum(r.tokens for r in read), trainer.run_state.totals()
    besides = sum(forward_flops(trainer.anatomy, r.tokens, r.pairs, heads=r.heads) for r in read)
    assert taken() == [], "the account has taken all"
    method.routed.readings.take = list
    assert counted > 2048, "the reference text alone is so long"
    assert total.flops > besides > 0
    trainer = stream_of(tmp_path / "unread", ("adding", True, 4, 20), ("counting", True, 4, 20))
    (method,) = trainer.methods
    method.routed.readings.take = list
    trainer.train()
    assert total.flops - trainer.run_state.totals().flops == pytest.approx(besides, rel=1e-6)


def test_labels_of_packed_documents_are_taken_out_one_by_one() -> None:
    texts = [[5, 6, 7, 8], [8, 7, 6]]
    packed = Collator(0)(
        [{"input_ids": texts[0] + texts[1], "labels": texts[0] + texts[1], "position_ids": [0, 1, 2, 3, 0, 1, 2],
          "segment_ids": [0] * 4 + [1] * 3}]
    )  # fmt: skip
    ids = document_ids(documents_in(packed))
    assert document_lengths(documents_in(packed)).tolist() == [4, 3]
    labels = labels_without(packed, ids[1:])
    assert labels is not None and labels[0].tolist() == [5, 6, 7, 8, -100, -100, -100]
    assert labels_without(packed, ids[:0]) is None


# -- resuming ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spawn", "at", "router"),
    [
        ({}, [9, 11, 17, 21], "prototype"),
        ({"max_experts": 2}, [15, 17, 18], "prototype"),
        ({"cooldown": 200}, [11], "prototype"),
        ({}, [9, 17], "bayes"),
    ],
    ids=["free", "capped", "cooling", "bayes"],
)
def test_trials_are_resumed_bitwise(
    tmp_path: Path, spawn: dict[str, Any], at: list[int], router: str
) -> None:
    """Before and after each check, of an expert on trial and of an older one that trains further."""

    def make(folder: Path) -> Any:
        parts = [
            ("adding", True, 6, 40),
            ("sorting", False, 6, 40),
            ("counting", True, 6, 9),
            ("adding", True, 6, 40),
        ]
        return stream_of(folder, *parts, spawn=spawn, router=router)

    resumed(tmp_path, make, at)


def test_a_segment_of_one_step_is_settled_when_the_next_begins(tmp_path: Path) -> None:
    trainer = stream_of(tmp_path, ("adding", True, 6, 40), ("sorting", True, 1, 40), ("adding", True, 2, 40))
    trainer.train()
    (method,) = trainer.methods
    assert not any(info.on_trial for info in method.experts.roster)
    assert kinds(method)[1] == "novel" and kinds(method)[2] in ("kept", "handed over", "dropped", "merged")
    assert all(t.isfinite().all() for n, t in state_of(trainer).items() if ".banks." in n)


# -- what the base does best ------------------------------------------------------------------------------------
def test_a_skill_that_the_base_serves_best_is_left_to_it(tmp_path: Path) -> None:
    """Nothing is gained and older experts do harm: B is 0, the router sends the skill there, no cap counts it."""
    trainer = stream_of(
        tmp_path,
        *[("adding", True, 12, 64), ("sorting", True, 8, 64), ("sorting", True, 4, 64)],
        spawn={"least_gain": 0.9, "max_experts": 1},
    )
    trainer.train()
    (method,) = trainer.methods
    assert kinds(method) == ["known", "capped", "left to the base", "known"]
    info = method.experts.roster.info(1)
    assert (
        info.resting and info.skills == ["sorting"] and not any(p.up.any() for p in method.experts.parts(1))
    )
    assert loss_of(method, 1, "sorting") == loss_of(method, None, "sorting")
    features = method.routed.features_of([Collator(0)(rows_of("sorting", 16, 9))])
    assert float((method.experts.routers.at()(features, ["0", "1"]).argmax(-1) == 1).float().mean()) > 0.95


def test_a_skill_left_to_the_base_has_another_chance_when_it_returns(tmp_path: Path) -> None:
    trainer = stream_of(
        tmp_path,
        ("adding", True, 12, 64),
        ("sorting", True, 2, 64),
        ("sorting", True, 12, 64),
        spawn={"least_gain": 0.04},
    )
    trainer.train()
    (method,) = trainer.methods
    assert kinds(method) == ["known", "novel", "left to the base", "known", "kept"]
    assert len(method.experts.roster) == 2 and not method.experts.roster.info(1).resting
    assert loss_of(method, 1, "sorting") < loss_of(method, None, "sorting")
