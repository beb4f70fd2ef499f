"""Laws of growth in training: births, doubled ranks and frozen linears, resumed bitwise at every edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from headgate.errors import ConfigError
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.spawn import Decision, SpawnPolicy, register_policy

from ..training.conftest import make_rows
from .conftest import SMALL, resumed, stream_stages, trainer_of


@register_policy("scripted_in_tests")
class Scripted(SpawnPolicy):
    """Novel, novel, then known to expert 1: a labelled stream that this policy answers by heart."""

    def decide(self, evidence: Any) -> Decision:
        nan = float("nan")
        expert = {0: 0, 4: None, 8: None, 12: 1}[evidence.global_step]
        return Decision(
            "novel" if expert is None else "known", expert, nan, nan, nan, nan, len(evidence.tokens_N)
        )


def test_resume_at_every_edge_of_growth_is_bitwise_exact(tmp_path: Path) -> None:
    """Inside a skill, at its last step, right after a birth; with a policy that looks at embeddings."""
    skills = ("adding", "sorting", "counting", "sorting")

    def make(folder: Path) -> Any:
        method = LoraExperts(
            **SMALL,
            gate_projection=3,
            orthogonality=0.1,
            kd_weight=0.1,
            spawn={"policy": "scripted_in_tests", "min_samples": 4, "min_tokens": 8, "gate": "own_loss"},
        )
        return trainer_of(folder, method, stages=stream_stages(4, skills), save_steps=1)

    resumed(tmp_path, make, [3, 4, 5, 9, 12, 14])


def test_rank_doubling_and_freezing_inside_a_skill(tmp_path: Path) -> None:
    """Survivors keep their AdamW state over the sub-stage, the schedule goes on, and a resume repeats it bitwise."""
    seen: dict[int, Any] = {}

    def make(folder: Path) -> Any:
        method = LoraExperts(
            **SMALL,
            experts=2,
            double_after=2,
            double_gain=0.99,
            max_rank=4,
            freeze_after=3,
            freeze_first=["q_proj"],
        )
        trainer = trainer_of(
            folder,
            method,
            eval_dataset=make_rows(8, seed=9),
            eval_strategy="steps",
            eval_steps=1,
            max_steps=10,
            save_steps=1,
            learning_rate=1e-2,
        )
        evaluations = iter([1.0] * 20)
        original = trainer.evaluation_loop

        def flat(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            output.metrics["eval_loss"] = next(evaluations)
            return output

        trainer.evaluation_loop = flat  # type: ignore[method-assign]

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
                adam = {id(p): int(s["step"]) for p, s in optimizer.state.items()}
                steps = {n: adam.get(id(p)) for n, p in method.named_parameters() if p.requires_grad}
                seen[state.global_step] = (
                    method.experts.roster.info(0).rank,
                    steps,
                    optimizer.param_groups[0]["lr"],
                )

        trainer.add_callback(Watch())
        return trainer

    trainer = make(tmp_path / "look")
    trainer.train()
    ranks = [seen[s][0] for s in sorted(seen)]
    assert ranks[0] == 2 and ranks[-1] == 4 and ranks == sorted(ranks)
    doubled = ranks.index(4) + 1
    steps = seen[doubled][1]
    assert all(v == 1 for n, v in steps.items() if ".experts.0." in n)
    assert all(v == doubled for n, v in steps.items() if ".experts.1." in n or "rows" in n)
    frozen = [s for s in sorted(seen) if not any("q_proj.experts.0" in n for n in seen[s][1])]
    assert frozen and any("k_proj.experts.0" in n for n in seen[frozen[0]][1])
    assert not any(".experts.0." in n for n in seen[10][1])
    rates = [seen[s][2] for s in sorted(seen)]
    assert rates == pytest.approx([1e-2 * (10 - s) / 10 for s in range(1, 11)])
    assert [r["stage"] for r in trainer.state.log_history if ": expert" in str(r.get("stage"))]
    resumed(tmp_path, make, [doubled - 1, doubled, frozen[0] - 1, 9])


def test_an_undecided_skill_trains_an_expert_on_trial_or_is_refused(tmp_path: Path) -> None:
    """Too few samples: said in the decision; with ``strict``, an error that names the cure."""
    for strict in (False, True):
        method = LoraExperts(**SMALL, spawn={"policy": "novelty", "min_samples": 10_000, "strict": strict})
        trainer = trainer_of(tmp_path / str(strict), method, stages=stream_stages(2))
        if strict:
            with pytest.raises(ConfigError, match=r"lower spawn\.min_samples"):
                trainer.train()
        else:
            trainer.train()
            assert [d["kind"] for d in method.stream.decisions][:2] == ["known", "undecided"]
            assert method.stream.decisions[1]["n"] == 64 and method.stream.decisions[1]["expert"] == 1
            assert not any(info.on_trial for info in method.experts.roster)
