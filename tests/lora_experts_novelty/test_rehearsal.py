"""A-GEM, DER++ and LwF against independent computations; what they keep is bounded, survives a kill, and is paid for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from headgate.errors import ConfigError
from headgate.methods.agem import AGEM
from headgate.methods.base import Method
from headgate.methods.derpp import DERPP
from headgate.methods.lwf import LwF, holding
from headgate.methods.rehearsal import Rehearsal
from headgate.modules.episodic_memory import EpisodicMemory
from headgate.ops.distillation import logit_matching_loss
from headgate.ops.gradient_projection import projection_coefficient
from headgate.ops.head_loss import head_logits
from tests.lora_experts_novelty.test_ewc import stream
from tests.training.conftest import make_rows, make_trainer, rows, same, trained  # noqa: F401


def of(name: str) -> Method:
    return {
        "agem": lambda: AGEM(per_skill=6, rows=3),
        "derpp": lambda: DERPP(alpha=0.7, beta=0.5, per_skill=6, rows=3),
        "lwf": lambda: LwF(weight=2.0, temperature=1.5),
    }[name]()


NAMES = ["agem", "derpp", "lwf"]


# -- equations ------------------------------------------------------------------------------------------------
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_the_projection_is_the_nearest_gradient_that_does_not_climb(seed: int, size: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    g, r, other = (torch.randn(size, generator=stream, dtype=torch.float64) for _ in range(3))
    ours = g - projection_coefficient(g, r) * r
    assert float(ours @ r) >= -1e-12 * float(r @ r)
    if float(g @ r) >= 0:
        assert torch.equal(ours, g)
    feasible = other if float(other @ r) >= 0 else -other
    assert float((ours - g).norm()) <= float((feasible - g).norm()) + 1e-12


def test_a_reference_without_gradient_projects_nothing() -> None:
    g = torch.tensor([1.0, -2.0])
    assert torch.equal(g - projection_coefficient(g, torch.zeros(2)) * torch.zeros(2), g)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_matched_logits_are_the_plain_mean_square(softcap: float | None) -> None:
    a, b = (torch.randn(5, 4, dtype=torch.float64, requires_grad=i == 0) for i in range(2))
    head = nn.Linear(4, 11).double()
    ours = logit_matching_loss(a, b, head.weight, head.bias, softcap=softcap)
    plain = (
        (
            head_logits(a.detach(), head.weight, head.bias, softcap)
            - head_logits(b, head.weight, head.bias, softcap)
        )
        .square()
        .mean()
    )
    torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours, a)
    z = head(a) if softcap is None else softcap * torch.tanh(head(a) / softcap)
    y = head(b) if softcap is None else softcap * torch.tanh(head(b) / softcap)
    (expected,) = torch.autograd.grad((z - y).square().mean(), a)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


# -- what they do in a stream -----------------------------------------------------------------------------------
def at(trainer: Any, method: Method, verb: str, look: Any) -> None:
    """Let ``look(original, *arguments)`` stand in for a verb of the method."""
    original = getattr(method, verb)
    object.__setattr__(method, verb, lambda *arguments: look(original, *arguments))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def documents(method: Any, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of kept documents, made without the method's own collator."""
    pairs = method.rehearsal.memory.documents[places]
    mask = pairs[..., 0] != -100
    return torch.where(mask, pairs[..., 0], 0), mask.long(), pairs[..., 1]


def test_a_step_of_agem_never_climbs_the_memory(make_trainer: Any) -> None:  # noqa: F811
    method, seen = AGEM(per_skill=6, rows=12), []
    trainer = make_trainer(**stream(), methods=[method])

    def look(original: Any, step: Any) -> Any:
        before = [p.grad.clone() for p in method.trained]
        line = original(step)
        after = torch.cat([p.grad.flatten() for p in method.trained])
        if step.is_window_end and step.scheduled.index:
            ids, mask, labels = documents(method, method.rehearsal.memory.before(step.scheduled.index))
            logits = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            r = torch.cat([g.flatten() for g in gradients(trainer.model, loss)])
            trainer.model.train()
            g = torch.cat([b.flatten() for b in before])
            seen.append((float(g @ r) / float(g.norm() * r.norm()), float(after @ r) / float(r @ r)))
            if g @ r >= 0:
                assert torch.equal(g, after)
            else:
                torch.testing.assert_close(after, g - (g @ r) / (r @ r) * r, rtol=1e-3, atol=1e-6)
                assert float(line["agem/conflict"]) == 1
        else:
            assert all(torch.equal(b, p.grad) for b, p in zip(before, method.trained, strict=True))
        return line

    at(trainer, method, "on_step_end", look)
    trainer.train()
    assert (
        len(seen) == 8
    )  # rows=12 is all that two skills leave: every step after the first skill sees all there is
    assert any(before < 0 for before, _ in seen), "no step was in conflict: the law was not tried"
    assert all(after > -1e-4 for _, after in seen)


def test_dark_replay_is_its_formula(make_trainer: Any) -> None:  # noqa: F811
    method = DERPP(alpha=0.7, beta=0.5, per_skill=6, rows=3)
    trainer, ends, checked = make_trainer(**stream(), methods=[method]), {}, []

    def logits_on(places: Tensor) -> Tensor:
        ids, mask, _ = documents(method, places)
        training = trainer.model.training
        logits = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits
        trainer.model.train(training)
        return logits

    def begin(original: Any, scheduled: Any, probe: Any) -> None:
        if scheduled.index:
            mine = (method.rehearsal.memory.owner == scheduled.index - 1).nonzero().flatten()
            ends.update(zip(mine.tolist(), logits_on(mine).detach(), strict=True))
        original(scheduled, probe)

    drawn: list[Tensor] = []

    def draw(*arguments: Any) -> Any:
        drawn.append(type(method.rehearsal).draw(method.rehearsal, *arguments))
        return drawn[-1]

    def start(original: Any, step: Any) -> None:
        original(step)
        places = drawn[-1]
        if places is None:
            assert step.scheduled.index == 0 and method.losses(step) == {}
            return
        assert len(places) == 6 and int(method.rehearsal.memory.owner[places].max()) < step.scheduled.index
        _, _, labels = documents(method, places)
        z = logits_on(places)[:, :-1]
        known = torch.stack([ends[p][: z.shape[1] + 1] for p in places.tolist()])[:, :-1]
        there = labels[:, 1:] != -100
        dark = (z[:3] - known[:3])[there[:3]].square().mean()
        light = functional.cross_entropy(z[3:][there[3:]], labels[3:, 1:][there[3:]])
        parts = method.losses(step)
        torch.testing.assert_close(parts["derpp_logits"], 0.7 * dark, rtol=2e-2, atol=1e-5)
        torch.testing.assert_close(parts["derpp_labels"], 0.5 * light, rtol=1e-4, atol=1e-5)
        expected = gradients(trainer.model, 0.7 * dark + 0.5 * light)
        for ours, theirs in zip(gradients(trainer.model, sum(parts.values())), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-4)
        checked.append(step.global_step)

    at(trainer, method, "on_stage_start", begin)
    at(trainer, method, "on_step_start", start)
    object.__setattr__(method.rehearsal, "draw", draw)
    trainer.train()
    assert len(checked) == 16

    # a longer document in the memory is nothing to the shorter ones
    model, memory, places = trainer.model, method.rehearsal.memory, torch.arange(6)
    before = method._memory_losses(model, places)
    memory.add(functional.pad(memory.documents[:1], (0, 0, 0, 7), value=5), 2)
    after = method._memory_losses(model, places)
    assert all(torch.equal(after[name], part) for name, part in before.items())


def test_the_old_model_is_asked_on_the_new_rows(make_trainer: Any) -> None:  # noqa: F811
    method, old, checked = LwF(weight=2.0, temperature=1.5), [], []
    trainer = make_trainer(**stream(), methods=[method])

    def begin(original: Any, scheduled: Any, probe: Any) -> None:
        if scheduled.index:
            old[:] = [[p.detach().clone() for p in method.trained]]
        original(scheduled, probe)

    def losses(original: Any, step: Any) -> Any:
        parts = original(step)
        if not old:
            assert parts == {}
            return parts
        other = dict(trainer.model.named_parameters())
        names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        inputs = {k: step.batch[k] for k in ("input_ids", "attention_mask")}
        other.update(zip(names, old[0], strict=True))
        then = torch.func.functional_call(trainer.model, other, kwargs=inputs).logits[:, :-1]
        now = trainer.model(**inputs).logits[:, :-1]
        there = step.labels[:, 1:] != -100
        p, q = (torch.log_softmax(z[there] / 1.5, -1) for z in (then, now))
        expected = 2.0 * 1.5**2 * (p.exp() * (p - q)).sum(-1).mean()
        torch.testing.assert_close(parts["lwf"], expected, rtol=1e-4, atol=1e-6)
        checked.append(float(expected.detach()))
        return parts

    at(trainer, method, "on_stage_start", begin)
    at(trainer, method, "losses", losses)
    trainer.train()
    assert len(checked) == 16 and max(checked) > 1e-3


def test_held_values_leave_a_graph_alone() -> None:
    layer = nn.Linear(3, 2, bias=False)
    x = torch.randn(4, 3, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    loss, own = layer(x).square().sum(), layer.weight.detach().clone()
    with holding([layer.weight], torch.zeros(6)):
        assert not layer(x).any()
    assert torch.equal(layer.weight, own)
    assert all(map(torch.equal, torch.autograd.grad(loss, [x, layer.weight]), expected))


# -- bounded, exact, paid ---------------------------------------------------------------------------------------
def test_the_memory_keeps_its_quota_of_every_segment() -> None:
    memory = EpisodicMemory()
    for segment, (count, length) in enumerate([(3, 5), (2, 9), (4, 2)]):
        memory.add(torch.full((count, length, 2), segment), segment)
    assert memory.owner.tolist() == [0] * 3 + [1] * 2 + [2] * 4
    assert memory.before(2).tolist() == [0, 1, 2, 3, 4] and memory.before(0).tolist() == []
    assert (memory.documents[0] != -100).sum() == 10 and memory.documents.shape == (9, 9, 2)
    memory.know(torch.tensor([3, 4]), torch.ones(2, 9, 6))
    again = EpisodicMemory()
    again.restore(memory.structure())
    again.load_state_dict(memory.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(memory.buffers(), again.buffers(), strict=True))


@pytest.mark.parametrize("name", ["agem", "derpp"])
def test_a_run_keeps_rows_of_every_skill_and_no_more(make_trainer: Any, name: str) -> None:  # noqa: F811
    method: Any = of(name)
    given = stream()
    make_trainer(**given, methods=[method]).train()
    memory = method.rehearsal.memory
    assert torch.bincount(memory.owner).tolist() == [6, 6, 6]
    for place, (document, owner) in enumerate(zip(memory.documents, memory.owner.tolist(), strict=True)):
        text = document[:, 0][document[:, 0] != -100].tolist()
        assert text in given["data"]["abc"[owner]]["input_ids"], place
    assert len({str(d.tolist()) for d in memory.documents}) == 18


def test_documents_without_a_label_are_not_kept() -> None:
    """A label on the first token alone is never predicted: there is nothing in such a document to hold on to."""
    ids = torch.arange(12).reshape(3, 4) + 5
    labels = torch.full_like(ids, -100)
    labels[0, 0], labels[1, 2] = ids[0, 0], ids[1, 2]
    rehearsal = Rehearsal("agem", 6)
    rehearsal.keep(SimpleNamespace(index=0), [{"input_ids": ids, "labels": labels}])  # type: ignore[arg-type]
    assert rehearsal.memory.documents[..., 0].tolist() == [ids[1].tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_killed_inside_a_later_skill_it_ends_the_same(make_trainer: Any, name: str) -> None:  # noqa: F811
    def trainer(folder: str) -> Any:
        return make_trainer(folder, **stream(), methods=[of(name)], arguments={"save_steps": 6})

    whole, again, plain = trainer("whole"), trainer("again"), make_trainer("plain", **stream())
    whole.train()
    plain.train()
    assert not same(trained(plain), trained(whole)), "it never did anything"
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert same(trained(whole), trained(again))
    states = [t.methods.state_dict() for t in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert float(whole.flops) == pytest.approx(float(again.flops))


@pytest.mark.parametrize("method", [DERPP(alpha=0.0, beta=0.0), LwF(weight=0.0)], ids=["derpp", "lwf"])
def test_without_weight_nothing_changes(make_trainer: Any, method: Method) -> None:  # noqa: F811
    plain, idle = make_trainer("p", **stream()), make_trainer("i", **stream(), methods=[method])
    plain.train()
    idle.train()
    assert same(trained(plain), trained(idle)) and float(plain.flops) == float(idle.flops)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_runs_besides_is_in_the_account(make_trainer: Any, name: str) -> None:  # noqa: F811
    charged, executed = [], []
    for methods in ([of(name)], []):
        trainer = make_trainer(str(len(charged)), **stream(), methods=methods, loss="chunked")
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        charged.append(float(trainer.flops))
        executed.append(counter.get_total_flops())
    ours, theirs = charged[0] / charged[1], executed[0] / executed[1]
    assert theirs > 1.1 and abs(ours / theirs - 1) < 0.05, f"{ours:.3f} charged, {theirs:.3f} executed"
    assert (ours - 1) / (theirs - 1) == pytest.approx(1, abs=0.09), "of what it adds alone"


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_trains_it_says_so(name: str) -> None:
    method = of(name)
    method.attach(SimpleNamespace(model=nn.Linear(2, 2).requires_grad_(False), head=None))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{name}: nothing trains"):
        method.check_run(10)
