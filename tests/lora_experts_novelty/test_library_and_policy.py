"""Laws of the skill library and of the spawn policies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from headgate.config import build_config
from headgate.errors import ConfigError
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.probe import Look
from headgate.methods.lora_experts.spawn import Evidence, SpawnConfig, build_policy
from headgate.methods.lora_experts.stream import SkillStream
from headgate.modules.skill_library import SkillLibrary

from .test_novelty import draws

WIDTH, LONG = 16, torch.full((48,), 60)


def look(skill: int, seed: int, count: int = 48) -> torch.Tensor:
    return draws(count, WIDTH, 0.3, centre=skill, seed=1000 * skill + seed)


def library(*skills: int) -> SkillLibrary:
    made = SkillLibrary(WIDTH)
    for skill in skills:
        made.add(skill, look(skill, 0), LONG)
    return made


def decide(made: SkillLibrary, embeddings: torch.Tensor, tokens: torch.Tensor = LONG, **more):
    settings = {k: more.pop(k) for k in list(more) if k in SpawnConfig.model_fields}
    policy = build_policy(SpawnConfig(**settings), made)
    return policy.decide(Evidence(embeddings, tokens, **{"num_experts": len(made.experts), **more}))


# -- library --------------------------------------------------------------------------------------------------
def test_library_survives_saving_whatever_its_size() -> None:
    made = library(0, 1, 10)
    made.remove(1)
    assert made.experts == [0, 10]
    again = SkillLibrary(WIDTH)
    again.restore(made.structure())
    again.load_state_dict(load(save({k: v.contiguous() for k, v in made.state_dict().items()})), strict=True)
    assert again.experts == made.experts
    embeddings = look(10, 5)
    assert torch.equal(again.similarities(embeddings, LONG), made.similarities(embeddings, LONG))
    assert torch.equal(again.calibrated_thresholds(0.02, 48), made.calibrated_thresholds(0.02, 48))


def test_a_library_of_another_size_does_not_load_silently() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        SkillLibrary(WIDTH).load_state_dict(library(0).state_dict(), strict=True)
    with pytest.raises(ConfigError, match="width 16, this model 8"):
        SkillLibrary(8).restore(library(0).structure())


def test_removing_leaves_the_others_as_they_were() -> None:
    made, embeddings = library(0, 1, 10), look(1, 3)
    before = made.similarities(embeddings, LONG)
    made.remove(1)
    assert torch.equal(made.similarities(embeddings, LONG), before[[0, 2]])
    for wrong in (1, 5):
        with pytest.raises(ConfigError, match="not in the library"):
            made.remove(wrong)


def test_prototypes_move_by_a_twentieth_and_keep_fp32() -> None:
    made = library(0).half()
    old = made.prototypes_KH[0].clone()
    assert old.dtype is torch.float32
    new = look(3, 0)
    made.update(0, new, LONG)
    torch.testing.assert_close(made.prototypes_KH[0], 0.95 * old + 0.05 * new.mean(0))


def test_a_skill_keeps_its_key_at_every_look() -> None:
    """By its label, or by its expert where no label is told; a new skill of the same expert has a key of its own."""
    routed = SimpleNamespace(experts=SimpleNamespace(hidden_size=WIDTH))
    stream = SkillStream(LoraExpertsConfig(), routed, seed=0)  # type: ignore[arg-type]
    seen = Look(look(0, 1), LONG)
    farm, shop = (
        stream.remember(number, seen, label, new=True) for number, label in enumerate(["farm", "shop"])
    )
    assert farm != shop and stream.remember(0, seen, "farm") == farm and stream.remember(1, seen) == shop
    assert stream.remember(1, seen, new=True) not in (farm, shop, None)
    assert stream.remember(1, Look(look(0, 1, 1), LONG[:1])) is None


def test_what_a_library_refuses() -> None:
    made = library(0)
    for act, message in (
        (lambda: made.add(0, look(0, 1), LONG, "a") + made.add(1, look(0, 1), LONG, "a"), "already"),
        (lambda: made.add(1, look(1, 1, 1), LONG[:1]), "two samples"),
        (lambda: made.set_reference(torch.ones(WIDTH)), "before the first skill"),
    ):
        with pytest.raises(ConfigError, match=message):
            act()


# -- novelty policy -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threshold", ["fixed", "calibrated"])
def test_new_skills_are_novel_and_known_ones_are_routed_to_their_expert(threshold: str) -> None:
    made, known = library(0, 1, 2), 0
    for skill in (0, 1, 2):
        for seed in range(1, 11):
            found = decide(made, look(skill, seed), threshold=threshold)
            assert found.kind != "novel" and found.expert == skill
            assert found.low <= found.similarity <= found.high and found.n == 48
            known += found.kind == "known"
    assert known >= 18  # the others wait for more samples, which settle it:
    assert all(
        decide(made, look(s, 1, 384), LONG.repeat(8), threshold=threshold).kind == "known" for s in (0, 1, 2)
    )
    assert [decide(made, look(s, 1), threshold=threshold).kind for s in (5, 6, 7)] == ["novel"] * 3


@pytest.mark.parametrize("spread", [0.2, 0.6, 1.0, 2.0])
def test_calibrated_decisions_spawn_falsely_less_than_two_in_a_hundred(spread: float) -> None:
    """Fresh looks at a known skill, of another size than the one it was learned from; up to twice the signal is noise."""
    false = 0
    for trial in range(10):
        made = SkillLibrary(WIDTH)
        made.add(0, draws(48, WIDTH, spread, seed=trial), LONG)
        for seed in range(20):
            fresh = draws(36, WIDTH, spread, seed=1000 + 100 * trial + seed)
            false += decide(made, fresh, LONG[:36]).kind == "novel"
            fresh = draws(384, WIDTH, spread, seed=5000 + 100 * trial + seed)
            false += decide(made, fresh, LONG.repeat(8)).kind == "novel"
    assert false / 400 <= 0.02


def test_a_decision_is_a_pure_function_of_the_evidence() -> None:
    made = library(0, 1)
    state = {k: v.clone() for k, v in made.state_dict().items()}
    assert decide(made, look(4, 1), global_step=9) == decide(made, look(4, 1), global_step=9)
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())


def test_too_little_data_waits() -> None:
    made = library(0)
    few = decide(made, look(5, 1, 31), LONG[:31])
    short = decide(made, look(5, 1), torch.full((48,), 10))
    assert few.kind == short.kind == "undecided"
    assert "31 samples of 32" in few.reason and "480 tokens of 2048" in short.reason
    assert decide(made, look(5, 1, 32), torch.full((32,), 64)).kind == "novel"


def test_an_interval_around_the_threshold_waits() -> None:
    made = library(0)
    between = look(0, 1) * 0.75 + look(5, 1) * 0.66  # cosine about .75 to expert 0
    found = decide(made, between, threshold="fixed", delta=0.0)
    assert found.low < found.threshold <= found.high and found.kind == "undecided"


def test_cooldown_holds_back_unlabelled_spawns_only() -> None:
    made, new = library(0), look(5, 1)
    soon = {"global_step": 299, "last_spawn_step": 100}
    assert decide(made, new, **soon).kind == "undecided"
    assert decide(made, new, global_step=300, last_spawn_step=100).kind == "novel"
    assert decide(made, new, skill="new", **soon).kind == "novel"


def test_performance_gate_keeps_a_skill_that_is_served_well() -> None:
    made, new = library(0), look(5, 1)
    served = decide(made, new, gate="own_loss", best_loss=1.1, loss_at_maturity=1.0)
    assert served.kind == "known" and served.expert == 0 and "serves it" in served.reason
    assert decide(made, new, gate="own_loss", best_loss=1.11, loss_at_maturity=1.0).kind == "novel"


def test_losses_on_different_texts_are_not_compared() -> None:
    """The plan's gate sent stories into Shakespeare's expert: 2.254 <= 4.319, where the bare base had 1.591."""
    assert decide(library(0), look(5, 1), best_loss=2.254, loss_at_maturity=4.319 / 1.1).kind == "novel"


def test_a_label_that_returns_finds_its_expert_whatever_the_look() -> None:
    """Few samples, another text, a full house: the name decides."""
    made = library(0, 1)
    for embeddings, tokens in ((look(5, 1), LONG), (look(5, 1, 3), LONG[:3])):
        again = decide(made, embeddings, tokens, skill="sorting", skills={"sorting": 1}, max_experts=2)
        assert (again.kind, again.expert) == ("known", 1)


def test_no_room_for_another_expert() -> None:
    found = decide(library(0, 1), look(5, 1), max_experts=2)
    assert found.kind == "capped" and "max_experts=2" in found.reason


def test_median_similarity_calls_every_skill_novel_once_experts_differ() -> None:
    """The plan's option as it is: the median over unlike experts is low even for a known skill."""
    made = library(0, 1, 2)
    assert decide(made, look(0, 1), similarity="median", threshold="fixed").kind == "novel"
    assert decide(made, look(0, 1), similarity="max", threshold="fixed").kind == "known"


# -- the other policies ---------------------------------------------------------------------------------------
def test_policies_by_name() -> None:
    made, none = SkillLibrary(WIDTH), (torch.zeros(0, WIDTH), torch.zeros(0))
    skills = {"farm": 0, "sports": 3}

    def kind(policy: str, **more):
        found = decide(made, *none, policy=policy, skills=skills, num_experts=4, current=3, **more)
        return found.kind, found.expert

    assert kind("always", skill="sports") == ("known", 3)
    assert kind("always", skill="new") == ("novel", None)
    assert kind("always", true_skill="new") == ("known", 3)  # not told: the latest goes on
    assert kind("oracle", true_skill="new") == ("novel", None)
    assert kind("oracle", true_skill="farm") == ("known", 0)
    assert kind("never", skill="new") == ("known", 3)  # the one there is
    with pytest.raises(ConfigError, match="true skill"):
        kind("oracle")
    first = decide(made, *none, policy="always", skill="any", num_experts=1)
    assert (first.kind, first.expert) == ("known", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "noveltyy"}, "did you mean 'novelty'"),
        ({"base": 0.3}, "threshold_min=0.4 exceeds base=0.3"),
        ({"min_samples": 1}, "min_samples"),
        ({"false_spawns": 0.6}, "false_spawns"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SpawnConfig, options)
