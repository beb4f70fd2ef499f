"""Laws of training: what moves, what does not, growth inside a skill, exact resume, rejected batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from headgate.errors import ConfigError
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.spawn import Decision, SpawnPolicy, register_policy
from headgate.models.anatomy import describe
from headgate.training.saved import load
from headgate.training.telemetry import is_known

from ..training.conftest import Toy, make_rows
from .conftest import batch_of, logits_of, stream_stages, trainer_of

SMALL: dict[str, Any] = {"r": 2, "alpha": 4, "new_r": 3, "new_alpha": 6, "maturity_steps": 3}


def method_of(trainer: Any) -> LoraExperts:
    (method,) = [m for m in trainer.methods if m.name == "lora_experts"]
    return method


def state_of(trainer: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.methods.state_dict().items()}


class At(TrainerCallback):
    """Calls back after chosen optimizer steps."""

    def __init__(self, **actions: Any) -> None:
        self.actions = {int(name.removeprefix("step")): action for name, action in actions.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.actions:
            self.actions[state.global_step]()


@pytest.mark.parametrize("router", ["learned", "uniform", "sum", "oracle"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_trainable_moves_by_the_third_step_and_nothing_else(
    tmp_path: Path, router: str, checkpointing: bool
) -> None:
    """In every stage of a stream; experts born in mid-run included. A frozen one stays bitwise, AdamW decay and all."""
    stages = stream_stages(3)
    method = LoraExperts(**SMALL, router=router, router_sites="shared")
    trainer = trainer_of(tmp_path, method, stages=stages, checkpointing=checkpointing, weight_decay=0.1)
    base = {n: p.clone() for n, p in trainer.model.named_parameters()}
    kept: dict[int, dict[str, Tensor]] = {}
    live: dict[int, set[str]] = {}

    def look(step: int) -> Any:
        def now() -> None:
            kept[step] = state_of(trainer)
            live[step] = {f"by_name.{n}" for n, _ in trainer.methods.by_name.named_parameters()}

        return now

    trainer.add_callback(At(**{f"step{s}": look(s) for s in (1, 3, 4, 6, 7, 9)}))
    trainer.train()
    assert [len(info.skills) for info in method.roster] == [1, 1, 1]
    for first, last in ((1, 3), (4, 6), (7, 9)):
        trained = live[last]
        floats = {n for n, t in kept[first].items() if ".banks." in n or ".routers." in n}
        moved = {n for n in floats if not torch.equal(kept[first][n], kept[last][n])}
        assert moved == trained & floats and moved
        assert {n.split(".experts.")[1].split(".")[0] for n in moved if ".banks." in n} == {
            str((last - 1) // 3)
        }
    assert all(torch.equal(base[n], p) for n, p in trainer.model.named_parameters())
    gradients = {
        n for n, p in trainer.methods.named_parameters() if p.grad is not None and p.grad.isfinite().all()
    }
    assert gradients == {n for n, _ in trainer.methods.named_parameters()}


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    """Growth, top-2, per-site routers and an auxiliary loss, with the blocks recomputed."""
    states = []
    for checkpointing in (False, True):
        method = LoraExperts(**SMALL, router_sites="per_site", entropy_token=0.1)
        trainer = trainer_of(
            tmp_path / str(checkpointing), method, stages=stream_stages(4), checkpointing=checkpointing
        )
        trainer.train()
        states.append(state_of(trainer))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-4, equal_nan=True)


@register_policy("scripted_in_tests")
class Scripted(SpawnPolicy):
    """Novel, novel, then known to expert 1: a labelled stream that this policy answers by heart."""

    def decide(self, evidence: Any) -> Decision:
        nan = float("nan")
        expert = {0: 0, 4: None, 8: None, 12: 1}[evidence.global_step]
        return Decision(
            "novel" if expert is None else "known", expert, nan, nan, nan, nan, len(evidence.tokens_N)
        )


def resumed(tmp_path: Path, make: Any, at: list[int]) -> None:
    whole = make(tmp_path / "whole")
    whole.args.save_steps, whole.state.save_steps = 1, 1
    whole.train()
    for step in at:
        again = make(tmp_path / f"again{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / f"checkpoint-{step}"))
        ours, wanted = state_of(again), state_of(whole)
        assert ours.keys() == wanted.keys(), f"resumed at {step}"
        wrong = [n for n in ours if not torch.equal(ours[n].nan_to_num(-1), wanted[n].nan_to_num(-1))]
        assert not wrong, f"resumed at {step}: {wrong[:4]}"
        assert method_of(again).structure() == method_of(whole).structure()


def test_resume_at_every_edge_of_growth_is_bitwise_exact(tmp_path: Path) -> None:
    """Inside a skill, at its last step, right after a birth; with a policy that looks at embeddings."""
    skills = ("adding", "sorting", "counting", "sorting")

    def make(folder: Path) -> Any:
        method = LoraExperts(
            **SMALL,
            gate_projection=3,
            orthogonality=0.1,
            kd_weight=0.1,
            spawn={"policy": "scripted_in_tests", "min_samples": 4, "min_tokens": 8},
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
                seen[state.global_step] = method.roster.info(0).rank, steps, optimizer.param_groups[0]["lr"]

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


def test_a_rejected_batch_moves_nothing(tmp_path: Path) -> None:
    """Ages, usage, losses and sketches follow accepted batches only."""
    method = LoraExperts(**SMALL, experts=2, gate_projection=2)
    trainer = trainer_of(tmp_path, method, others=[Toy(pattern="10")], max_steps=6)
    kept: dict[int, dict[str, Tensor]] = {}
    trainer.add_callback(
        At(**{f"step{s}": lambda s=s: kept.update({s: state_of(trainer)}) for s in range(1, 7)})
    )
    trainer.train()
    for step in range(1, 6):
        own = [n for n in kept[step] if ".lora_experts." in n]
        moved = [
            n for n in own if not torch.equal(kept[step][n].nan_to_num(-1), kept[step + 1][n].nan_to_num(-1))
        ]
        assert bool(moved) == (step % 2 == 0), (step, moved)
    assert method.roster.age.tolist() == [3, 3]


def test_auxiliary_losses_have_gradients_where_they_should(tmp_path: Path) -> None:
    model_trainer = trainer_of(
        tmp_path,
        LoraExperts(
            **SMALL,
            experts=3,
            balance=1.0,
            z_loss=1.0,
            entropy_token=1.0,
            entropy_mean=1.0,
            orthogonality=1.0,
            kd_weight=1.0,
        ),
        max_steps=1,
    )
    method = method_of(model_trainer)
    method.freeze(1)
    found: dict[str, set[str]] = {}
    original = method.losses

    def watched(step: Any) -> Any:
        parts = original(step)
        named = {n: p for n, p in method.named_parameters() if p.requires_grad}
        for part, value in parts.items():
            gradients = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
            found[part] = {
                ("rows" if "rows" in n else n.split(".")[-1])
                for (n, _), g in zip(named.items(), gradients, strict=True)
                if g is not None and float(g.abs().sum()) > 0
            }
        return parts

    method.losses = watched  # type: ignore[method-assign]
    with torch.no_grad():
        for name, tensor in method.banks.named_parameters():
            if name.endswith("up"):
                tensor.normal_(std=0.1)
    model_trainer.train()
    assert found["expert_balance"] == found["expert_z"] == found["expert_entropy"] == {"rows"}
    assert found["expert_orthogonality"] == {"down"}
    assert found["expert_kd"] == {"rows", "down", "up"}


def test_orthogonality_and_balance_are_their_formulas(tmp_path: Path) -> None:
    from headgate.methods.lora_experts.teaching import orthogonality

    from .conftest import attached, model_of

    _, anatomy = model_of()
    method = attached(anatomy, experts=3, r=2)
    method.current = 2
    method.freeze(0)
    method.freeze(1)
    wanted = 0.0
    for site in method.banks:
        bank = method.bank(site)
        for i in ("0", "1"):
            for a in bank.expert(i).down:
                for b in bank.expert("2").down:
                    wanted += abs(float(a @ b))
    assert float(orthogonality(method)) == pytest.approx(wanted, rel=1e-4)


def test_saved_by_the_trainer_and_loaded_it_computes_the_same(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LoraExperts(**SMALL), stages=stream_stages(4), seed=1)
    trainer.base_model = {"name_or_path": "random:llama"}
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert {n for row in rows for n in row if not is_known(n)} <= {"step"}
    assert not any("by_name" in n for n, _ in trainer.model.named_parameters())
    model, _ = load(tmp_path / "saved", device="cpu")
    trainer.model.eval()
    batch = batch_of()
    assert torch.equal(logits_of(model, **batch), logits_of(trainer.model, **batch))
    (method,) = model.headgate_methods
    method.set_routing("expert:sorting")
    one = logits_of(model, **batch)
    method.set_routing("expert:1")
    assert torch.equal(one, logits_of(model, **batch))
    with pytest.raises(ConfigError, match="skills adding, counting, sorting"):
        method.set_routing("expert:sortin")
    assert describe(model).model is model


def test_an_undecided_skill_trains_the_nearest_expert_or_is_refused(tmp_path: Path) -> None:
    """Too few samples: said in the decision; with ``strict``, an error that names the cure."""
    for strict in (False, True):
        method = LoraExperts(**SMALL, spawn={"policy": "novelty", "min_samples": 10_000, "strict": strict})
        trainer = trainer_of(tmp_path / str(strict), method, stages=stream_stages(2))
        if strict:
            with pytest.raises(ConfigError, match=r"lower spawn\.min_samples"):
                trainer.train()
        else:
            trainer.train()
            assert len(method.roster) == 1
            assert [d["kind"] for d in method.decisions] == ["undecided"] * 3
            assert method.decisions[0]["n"] == 64


def test_distillation_looks_at_replayed_rows_only(tmp_path: Path) -> None:
    """The loss is that of a batch of those rows alone; with none there is none; the FLOPs count the teacher's share."""
    from headgate.methods.lora_experts.teaching import backward_distillation, distilled_rows
    from headgate.training.order import Replay

    method = LoraExperts(**SMALL, kd_weight=1.0, kd_on="replayed")
    assert list(method.columns()) == ["skill"]
    stages = stream_stages(4, ("adding", "sorting"))
    rows = {
        stage.name: make_rows(seed=i).add_column("skill", [stage.options["skill"]] * 64)
        for i, stage in enumerate(stages)
    }
    trainer = trainer_of(
        tmp_path, method, stages=stages, rows=rows, columns=["skill"], replay=Replay(0.5, 32)
    )
    seen: list[tuple[int, int, float]] = []
    original = method.losses

    def watched(step: Any) -> Any:
        parts = original(step)
        replayed = distilled_rows(method, step.batch)
        assert [step.batch["skill"][i] != method.skill for i in range(4)] == [i in replayed for i in range(4)]
        assert ("expert_kd" in parts) == bool(len(replayed) and step.global_step >= 4)
        if "expert_kd" in parts:
            few = {k: v[replayed] for k, v in step.batch.items() if k != "skill"}
            few["skill"] = [step.batch["skill"][i] for i in replayed]
            alone = replace(step, batch=few, hidden=step.hidden[replayed])
            torch.testing.assert_close(backward_distillation(method, alone), parts["expert_kd"])
        seen.append((step.global_step, len(replayed), method.extra_forwards(step)))
        return parts

    method.losses = watched  # type: ignore[method-assign]
    trainer.train()
    assert all(n == 0 for at, n, _ in seen if at < 4) and 0 < sum(n for *_, n, _ in seen) < 16
    assert all(extra == (n / 4 if at >= 4 else 0) for at, n, extra in seen)
