"""EWC against an explicit reference, and a stream through the trainer: exact resume, the matrix, early stopping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from headgate.errors import ConfigError
from headgate.experiments.recipe_file import recipe_from
from headgate.experiments.run import run
from headgate.methods.ewc import EWC
from headgate.methods.stage import Stage
from headgate.training.order import Replay
from tests.training.conftest import make_rows, make_trainer, rows, same, trained  # noqa: F401


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[0.5]]))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def at(tokens: int = 10, **more: Any) -> Any:
    return SimpleNamespace(is_window_end=True, accepted=True, num_tokens=tokens, window_tokens=None, **more)


def test_penalty_and_fisher_equal_the_formulas() -> None:
    model = Toy()
    ewc = EWC(strength=3.0, decay=0.5, beta=0.9)
    ewc.attach(SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert ewc.losses(at()) == {}
    stream, fisher = torch.Generator().manual_seed(0), torch.zeros(3)
    anchor = torch.zeros(3)

    def theta() -> torch.Tensor:
        return torch.cat([model.a.detach(), model.b.detach().reshape(-1)])

    for skill in range(3):
        ewc.on_stage_start(SimpleNamespace(index=skill), None)  # type: ignore[arg-type]
        running = torch.zeros(3)
        for _ in range(4):
            task = torch.randn(3, generator=stream)
            for p in (model.a, model.b):
                p.grad = None
            pieces = torch.cat([model.a, model.b.reshape(-1)])
            penalty = ewc.losses(at())
            total = (task * pieces).sum() + sum(penalty.values())
            total.backward()
            expected = 0.5 * 3.0 * (fisher * (theta() - anchor) ** 2).sum()
            assert float(sum(p.detach() for p in penalty.values())) == pytest.approx(
                float(expected), abs=1e-6
            )
            got = torch.cat([model.a.grad, model.b.grad.reshape(-1)])  # type: ignore[union-attr, list-item]
            torch.testing.assert_close(got, task + 3.0 * fisher * (theta() - anchor))
            ewc.on_step_end(at(tokens=7))
            running = 0.9 * running + 0.1 * 7 * task**2  # the penalty's gradient is no evidence
            torch.testing.assert_close(ewc.memory.running, running)
            with torch.no_grad():
                model.a -= 0.1 * model.a.grad  # type: ignore[operator]
                model.b -= 0.1 * model.b.grad  # type: ignore[operator]
        fisher, anchor = 0.5 * fisher + running / (1 - 0.9**4), theta()
    ewc.on_stage_start(SimpleNamespace(index=3), None)  # type: ignore[arg-type]
    torch.testing.assert_close(ewc.memory.fisher, fisher)
    torch.testing.assert_close(ewc.memory.anchor, anchor)


def test_rejected_and_unfinished_windows_are_no_evidence() -> None:
    model, ewc = Toy(), EWC()
    ewc.attach(SimpleNamespace(model=model))  # type: ignore[arg-type]
    model.a.grad, model.b.grad = torch.ones(2), torch.ones(1, 1)
    for step in (
        SimpleNamespace(is_window_end=False, accepted=True),
        SimpleNamespace(is_window_end=True, accepted=False),
    ):
        ewc.on_step_end(step)  # type: ignore[arg-type]
    assert int(ewc.memory.updates) == 0 and not ewc.memory.running.any()


def test_saved_ewc_fits_its_own_model_only() -> None:
    ewc = EWC()
    ewc.attach(SimpleNamespace(model=Toy()))  # type: ignore[arg-type]
    again = EWC.from_structure(ewc.structure())
    again.load_state_dict(ewc.state_dict(), strict=True)
    again.attach(SimpleNamespace(model=nn.Linear(2, 2).requires_grad_(False)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="saved over 3 trained parameters, this model trains 6"):
        again.attach(SimpleNamespace(model=nn.Linear(2, 2)))  # type: ignore[arg-type]


# -- through the trainer --------------------------------------------------------------------------------------
def stream(steps: int = 4) -> dict[str, Any]:
    return {
        "data": {name: make_rows(20, seed=i) for i, name in enumerate("abc")},
        "stages": [
            Stage(name=n, steps=steps, train={"lora": 1e-2}, data=n, options={"skill": n, "labelled": True})
            for n in "abc"
        ],
    }


def test_a_stream_with_replay_and_ewc_resumes_exactly(make_trainer: Any) -> None:  # noqa: F811
    """Interrupted inside the second skill, with anchors set and replayed rows in the batches."""

    def trainer(folder: str) -> Any:
        return make_trainer(
            folder,
            **stream(),
            methods=[EWC(strength=10.0)],
            replay=Replay(0.4, 8),
            arguments={"save_steps": 6},
        )

    whole, cut = trainer("whole"), trainer("cut")
    whole.train()
    assert int(whole.methods.by_name["ewc"].memory.skills) == 2
    cut.args.max_steps = 12
    cut.train()
    again = trainer("cut")
    again.train(resume_from_checkpoint=str(cut.args.output_dir) + "/checkpoint-6")
    assert same(trained(whole), trained(again))
    states = [t.methods.state_dict() for t in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_ewc_without_strength_changes_nothing(make_trainer: Any) -> None:  # noqa: F811
    plain, idle, held = (
        make_trainer(n, **stream(), methods=m)
        for n, m in (("p", []), ("i", [EWC(strength=0.0)]), ("h", [EWC(strength=1e4)]))
    )
    for one in (plain, idle, held):
        one.train()
    assert same(trained(plain), {k: v for k, v in trained(idle).items() if "lora" in k})
    assert not same(trained(plain), {k: v for k, v in trained(held).items() if "lora" in k})


def recipe(tmp_path: Any, **changes: Any) -> Any:
    def skill(name: str) -> dict[str, Any]:
        source = {"source": "wordmath", "options": {"families": [name]}}
        return {
            "skill": name,
            "limit": 24,
            "steps": 3,
            **source,
            "validation": {**source, "split": "validation", "limit": 4},
        }

    return recipe_from(
        {
            "name": "stream",
            "output_dir": str(tmp_path),
            "model": {"name_or_path": "random:llama"},
            "data": {"max_length": 64, "stream": [skill("farm"), skill("sports"), skill("farm")], **changes.pop("data", {})},
            "training": {"per_device_train_batch_size": 2, "eval_every": 1000, "save_every": 1000, **changes.pop("training", {})},
            **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    "data", [{}, {"stream_order": "joint"}, {"replay": {"ratio": 0.3}}], ids=["plain", "joint", "replay"]
)
def test_every_arm_gets_its_matrix(tmp_path: Any, data: dict[str, Any]) -> None:
    found = run(recipe(tmp_path, data=data)).result()["continual"]
    assert found["skills"] == ["farm", "sports"] and found["segments"] == ["farm", "sports", "farm"]
    assert found["steps"] == [3, 6, 9] and [len(row) for row in found["matrix"]] == [2, 2, 2]
    assert found["average"] == pytest.approx(sum(found["matrix"][-1]) / 2)
    assert all(value is None for value in (found["forgetting"], found["backward_transfer"])) == bool(
        data.get("stream_order")
    )


def test_the_base_model_has_a_matrix_too(tmp_path: Any) -> None:
    base = run(recipe(tmp_path, training={"max_steps": 0})).result()["continual"]
    trained_run = run(recipe(tmp_path)).result()["continual"]
    assert base["before"] == trained_run["before"] and base["matrix"] == [base["before"]] * 3
    assert base["backward_transfer"] == base["forward_transfer"] == 0


def test_early_stopping_on_a_skill(tmp_path: Any) -> None:
    """A named data set's loss decides; a stream cut short has no matrix rather than one with holes."""
    stopping = {
        "early_stopping": {"metric": "eval_target_loss", "patience": 1},
        "eval_every": 1,
        "learning_rate": 1e-12,
    }
    target = {"source": "wordmath", "split": "validation", "limit": 4, "options": {"families": ["garden"]}}
    result = run(recipe(tmp_path, training=stopping, data={"watch": {"target": target}})).result()
    assert "eval_target_loss" in result["training"]
    assert result["training"]["steps"] < 9 and "continual" not in result
