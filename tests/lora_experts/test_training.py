"""Laws of training: what moves and what does not, auxiliary losses, rejected batches, saving."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.teaching import auxiliary_losses
from headgate.models.anatomy import describe
from headgate.training.saved import load
from headgate.training.telemetry import is_known

from ..training.conftest import Toy, make_rows
from .conftest import SMALL, At, batch_of, logits_of, method_of, state_of, stream_stages, trainer_of


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
    assert [len(info.skills) for info in method.experts.roster] == [1, 1, 1]
    for first, last in ((1, 3), (4, 6), (7, 9)):
        trained = live[last]
        floats = {n for n, t in kept[first].items() if ".banks." in n or ".routers." in n}
        moved = {n for n in floats if not torch.equal(kept[first][n], kept[last][n])}
        assert moved == trained & floats and moved
        assert {n.rsplit(".experts.", 1)[1].split(".")[0] for n in moved if ".banks." in n} == {
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
    assert method.experts.roster.age.tolist() == [3, 3]


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
    method.experts.freeze(1)
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
        for name, tensor in method.experts.banks.named_parameters():
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
    method.experts.current = 2
    method.experts.freeze(0)
    method.experts.freeze(1)
    wanted = 0.0
    for site in method.experts.banks:
        bank = method.experts.bank(site)
        for i in ("0", "1"):
            for a in bank.expert(i).down:
                for b in bank.expert("2").down:
                    wanted += abs(float((a @ b).detach()))
    assert float(orthogonality(method.experts)) == pytest.approx(wanted, rel=1e-4)


def test_routers_of_several_sites_share_a_term_equally() -> None:
    """Logits of (0, 0) and of (1, 1): their logsumexp is ln 2 and 1 + ln 2."""
    logits = [torch.zeros(1, 3, 2), torch.ones(1, 3, 2)]
    mixtures = [SimpleNamespace(gates=SimpleNamespace(logits=z), probs=None, experts="0") for z in logits]
    config = LoraExpertsConfig(router_sites="per_site", z_loss=0.5)
    routed: Any = SimpleNamespace(config=config, mixtures_of=lambda done: mixtures)
    done: Any = SimpleNamespace(context=SimpleNamespace(valid=torch.ones(1, 3, dtype=torch.bool)))
    parts = auxiliary_losses(routed, done, step=None, skill=None)  # type: ignore[arg-type]
    assert set(parts) == {"expert_z"}
    wanted = 0.5 * (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert float(parts["expert_z"]) == pytest.approx(wanted)


def test_saved_by_the_trainer_and_loaded_it_computes_the_same(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LoraExperts(**SMALL), stages=stream_stages(4), seed=1)
    trainer.base_model = {"name_or_path": "random:llama"}
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert {n for row in rows for n in row if not is_known(n, LoraExperts.telemetry_names)} <= {"step"}
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
        replayed = distilled_rows("replayed", step.batch, method.stream.skill)
        assert [step.batch["skill"][i] != method.stream.skill for i in range(4)] == [
            i in replayed for i in range(4)
        ]
        assert ("expert_kd" in parts) == bool(len(replayed) and step.global_step >= 4)
        if "expert_kd" in parts:
            few = {k: v[replayed] for k, v in step.batch.items() if k != "skill"}
            few["skill"] = [step.batch["skill"][i] for i in replayed]
            alone = replace(step, batch=few, hidden=step.hidden[replayed])
            torch.testing.assert_close(
                backward_distillation(method.routed, alone, method.stream.skill), parts["expert_kd"]
            )
        seen.append((step.global_step, len(replayed), method.cost(step).forwards))
        return parts

    method.losses = watched  # type: ignore[method-assign]
    trainer.train()
    assert all(n == 0 for at, n, _ in seen if at < 4) and 0 < sum(n for *_, n, _ in seen) < 16
    assert all(extra == (n / 4 if at >= 4 else 0) for at, n, extra in seen)
