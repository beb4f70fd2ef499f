"""The method in a model: removal, padding, packing, checkpointing, tag loss, state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from headgate.errors import ModelError
from headgate.methods.compose import MethodStack
from headgate.methods.schema_bank import SchemaBank
from headgate.methods.schema_bank.reporting import document_logits
from headgate.methods.stage import ScheduledStage, Stage
from headgate.methods.step import Step
from headgate.models.anatomy import describe
from headgate.models.load import load_model
from headgate.ops.randomness import generator

from .conftest import SMALL, tiny

SUPERVISED = Stage(
    name="router", share=1.0, train={"schema_router": 1e-3}, options={"tags": True, "orth": True}
)


def make_step(model: Any, batch: dict[str, Any], stage_step: int = 0, log: bool = True) -> Step:
    return Step(
        batch=batch,
        scheduled=ScheduledStage(SUPERVISED, 0, 0, 8),
        global_step=stage_step,
        micro_step=stage_step,
        seed=0,
        max_steps=8,
        model=model,
        should_log=log,
    )


def attached(**options: Any) -> tuple[Any, SchemaBank]:
    model, _ = tiny(activation_checkpointing=options.pop("activation_checkpointing", False))
    method = SchemaBank(**{**SMALL, "init_std": 0.2, **options})
    method.attach(describe(model))
    return model, method


def rows(lengths: list[int], width: int | None = None, pad: int = 0) -> dict[str, Any]:
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), pad)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(3, 1000, (n,), generator=torch.Generator().manual_seed(i))
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    tags = torch.tensor([[i % 6] for i in range(len(lengths))])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "tags": tags}


def forward(model: Any, batch: dict[str, Any]) -> Any:
    inputs = {k: v for k, v in batch.items() if k not in ("tags", "segment_ids")}
    return model(**inputs, use_cache=False)


def one_step(
    model: Any, method: SchemaBank, batch: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and telemetry of one accepted micro-batch, its backward done."""
    model.train()
    step = make_step(model, batch)
    method.on_step_start(step)
    loss = forward(model, batch).loss
    parts = dict(method.losses(step))
    (loss + sum(parts.values())).backward()
    return parts, dict(method.on_step_end(step))


@pytest.mark.parametrize("combine", ["add", "replace"])
def test_removal_is_bitwise_the_plain_adapter(combine: str) -> None:
    model, _ = tiny()
    batch = rows([5, 9])
    model.eval()
    plain = forward(model, batch).logits
    method = SchemaBank(**SMALL, init_std=0.2, combine=combine)
    method.attach(describe(model))
    assert torch.equal(forward(model, batch).logits, plain), "removed is the default at evaluation"
    method.set_routing("on")
    assert not torch.equal(forward(model, batch).logits, plain)
    method.set_routing("removed")
    assert torch.equal(forward(model, batch).logits, plain)
    method.set_routing("all")
    method.detach()
    assert torch.equal(forward(model, batch).logits, plain)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox"])
def test_every_family_of_blocks_takes_a_bank(family: str) -> None:
    """Blocks that return a tensor and blocks that return a tuple; keys and hidden-state capture stay."""
    model, _ = load_model(f"random:{family}", lora=None, device="cpu", seed=0)
    model.eval()
    batch = rows([5, 9])
    ids = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "output_hidden_states": True,
    }
    plain, keys = model(**ids), list(model.state_dict())
    method = SchemaBank(**SMALL, init_std=0.2, eval_routing="on")
    method.attach(describe(model))
    routed = model(**ids)
    assert list(model.state_dict()) == keys and len(routed.hidden_states) == len(plain.hidden_states)
    assert torch.equal(routed.hidden_states[2], plain.hidden_states[2])
    assert routed.logits.shape == plain.logits.shape and not torch.equal(routed.logits, plain.logits)
    method.detach()
    assert torch.equal(model(**ids).logits, plain.logits)


@pytest.mark.parametrize("factor", ["down", "up"])
def test_at_the_identity_the_function_is_unchanged_and_tags_still_train_the_router(factor: str) -> None:
    model, method = attached()
    batch = rows([5, 9])
    for layer in method.layers.values():
        torch.nn.init.zeros_(getattr(layer.bank, factor))
    method.set_routing("on")
    model.eval()
    on = forward(model, batch).logits
    method.set_routing("removed")
    assert torch.equal(on, forward(model, batch).logits)
    one_step(model, method, batch)
    for layer in method.layers.values():
        assert layer.router.weight.grad.abs().max() > 1e-6


def test_padding_changes_no_loss_and_no_statistic() -> None:
    model, method = attached()
    short, _ = one_step(model, method, rows([5, 9, 7]))
    before = {k: layer.load_average.clone() for k, layer in method.layers.items()}
    gradient = {n: p.grad.clone() for n, p in method.named_parameters()}
    padded_model, padded = attached()
    long, _ = one_step(padded_model, padded, rows([5, 9, 7], width=20, pad=17))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)
    for name, parameter in padded.named_parameters():
        torch.testing.assert_close(parameter.grad, gradient[name], rtol=1e-4, atol=1e-6)
    for key, layer in padded.layers.items():
        torch.testing.assert_close(layer.load_average, before[key])


def test_packed_documents_are_examples() -> None:
    """Tag loss and loads of packed rows equal those of one document per row."""
    model, method = attached()
    apart, told = one_step(model, method, rows([5, 9, 7]))
    source = rows([5, 9, 7])
    documents = [source["input_ids"][i, :n] for i, n in enumerate([5, 9, 7])]
    ids = torch.stack([torch.cat(documents[:2]), torch.cat([documents[2], torch.zeros(7, dtype=torch.long)])])
    segments = torch.tensor([[0] * 5 + [1] * 9, [0] * 7 + [-1] * 7])
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(9)]), torch.cat([torch.arange(7)] * 2)])
    batch = {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(segments < 0, -100),
        "segment_ids": segments,
        "tags": [[[0], [1]], [[2]]],
    }
    packed_model, packed = attached()
    together, packed_told = one_step(packed_model, packed, batch)
    torch.testing.assert_close(together["schema_tag"], apart["schema_tag"], rtol=1e-5, atol=1e-6)
    for name in told:
        torch.testing.assert_close(packed_told[name], told[name], rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient_and_no_telemetry() -> None:
    found = []
    for checkpointing in (False, True):
        model, method = attached(activation_checkpointing=checkpointing)
        parts, told = one_step(model, method, rows([5, 9]))
        gradients = {
            n: p.grad.clone()
            for n, p in [*method.named_parameters(), *model.named_parameters()]
            if p.grad is not None
        }
        found.append((parts, told, gradients))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_a_second_pass_does_not_overwrite_the_first() -> None:
    model, method = attached()
    batch = rows([5, 9])
    step = make_step(model, batch)
    model.train()
    method.on_step_start(step)
    forward(model, batch)
    wanted = method.losses(step)["schema_tag"]
    forward(model, rows([3, 4]))
    assert torch.equal(method.losses(step)["schema_tag"], wanted)


def test_a_pass_without_a_graph_is_no_pass_to_learn_from() -> None:
    """A teacher's no-grad pass is not recorded, and a step without any other is refused, not ignored."""
    model, method = attached()
    batch = rows([5, 9])
    step = make_step(model, batch)
    model.train()
    method.on_step_start(step)
    with torch.no_grad():
        forward(model, batch)
    with pytest.raises(ModelError, match="use_reentrant"):
        method.losses(step)


def test_the_tag_draw_follows_schedule_and_seed() -> None:
    """The loss at a stage's end is the loss of the examples that the step's own draw keeps."""
    model, method = attached(tag_schedule=[1.0, 0.5])
    batch = rows([6] * 8)
    model.train()
    losses = {}
    for at in (0, 7):
        step = make_step(model, batch, stage_step=at)
        method.on_step_start(step)
        forward(model, batch)
        losses[at] = float(method.losses(step)["schema_tag"].detach())
        means, tags = document_logits(step, method._records)
        kept = (
            torch.ones(8) if at == 0 else torch.rand(8, generator=generator(0, 7, "schema_bank.tags")) < 0.5
        )
        each = [-torch.log_softmax(m, -1).gather(-1, tags).squeeze(-1) for m in means.values()]
        wanted = torch.stack([(e * kept).sum() / 8 for e in each]).mean()
        assert losses[at] == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert losses[7] < losses[0]


def test_rejected_batches_move_no_statistic() -> None:
    model, method = attached()
    batch = rows([5, 9])
    step = make_step(model, batch)
    model.train()
    method.on_step_start(step)
    forward(model, batch)
    step.accepted = False
    before = {n: b.clone() for n, b in method.named_buffers()}
    assert method.on_step_end(step) == {}
    assert all(torch.equal(b, before[n]) for n, b in method.named_buffers())


def test_stage_one_builds_no_graph_below_the_first_bank() -> None:
    model, method = attached()
    for parameter in [*model.parameters(), *(p for g in method.parameter_groups().values() for p in g)]:
        parameter.requires_grad_(False)
    for parameter in method.parameter_groups()["schema_router"]:
        parameter.requires_grad_(True)
    seen: list[bool] = []
    blocks = describe(model).blocks
    blocks[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0].requires_grad))
    model.train()
    loss = forward(model, rows([5, 9])).loss
    assert seen == [False] and loss.requires_grad


def test_state_survives_structure_and_strict_load() -> None:
    _, method = attached(attributes="scalar", preset="default")
    again = SchemaBank.from_structure(method.structure())
    again.load_state_dict(method.state_dict(), strict=True)
    model, _ = tiny()
    again.attach(describe(model))
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), method.state_dict().values(), strict=True)
    )


def test_a_bank_of_another_model_is_refused() -> None:
    _, method = attached()
    other, _ = load_model("random:gpt_neox", lora=None, device="cpu")
    again = SchemaBank.from_structure({**method.structure(), "blocks": [2, 9]})
    with pytest.raises(ModelError, match="its own base model"):
        again.attach(describe(other))


def test_two_replacing_banks_cannot_share_a_block() -> None:
    assert SchemaBank(**SMALL).claims() == ()
    _, method = attached(combine="replace")
    assert method.claims() == ["replaces:block 2", "replaces:block 3"]
    assert MethodStack([method]).parameter_groups().keys() == {"schema_router", "schema_bank"}


def test_generation_runs_with_and_without_routing(tmp_path: Path) -> None:
    model, method = attached()
    model.eval()
    ids = rows([6])["input_ids"]
    removed = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    method.set_routing("on")
    cached = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    full = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, full)
    method.detach()
    assert torch.equal(removed, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
    assert isinstance(model, PeftModel)
