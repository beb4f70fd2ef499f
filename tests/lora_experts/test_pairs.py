"""Laws of lora_experts beside the other methods, one pair at a time; what each pair means is in its docs page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from headgate.errors import ConfigError, ModelError
from headgate.methods.backward_gate import BackwardGate
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.schema_bank import SchemaBank
from headgate.models.anatomy import describe

from ..training.conftest import make_rows
from .conftest import SKILLS, SMALL, batch_of, logits_of, method_of, state_of, stream_stages, trainer_of


def own(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.nan_to_num(-1) for n, t in state.items() if ".lora_experts." in n}


def test_with_backward_gate_only_accepted_batches_make_an_expert_older(tmp_path: Path) -> None:
    """A batch the gate refuses moves no expert, no age and no router statistic, and births happen all the same."""
    gate = BackwardGate(target_acceptance=0.5, m=32, k=4, window=8, burn_in=0, diagnostic_every=0)
    method = LoraExperts(**SMALL)
    trainer = trainer_of(tmp_path, method, stages=stream_stages(6), others=[gate])
    states, accepted = [own(state_of(trainer))], []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            states.append(own(state_of(trainer)))
            accepted.append(trainer.window.accepted > 0)

    trainer.add_callback(Watch())
    trainer.train()
    assert len(method.experts.roster) == 3 and 0 < sum(accepted) < len(accepted)
    for step, took in enumerate(accepted):
        before, after = states[step], states[step + 1]
        if before.keys() == after.keys() and step % 6:
            assert took == any(not torch.equal(before[n], after[n]) for n in after)
    assert int(method.experts.roster.age[0]) == sum(accepted)


def test_with_schema_bank_the_bank_belongs_to_the_stream_and_goes_afterwards(tmp_path: Path) -> None:
    """Both train in every skill; with the bank removed, what is left is exactly the experts."""
    bank = SchemaBank(num_schemas=4, rank=2, top_k=2, curriculum="joint", lambda_tag=0.0)
    trainer = trainer_of(tmp_path, LoraExperts(**SMALL), stages=stream_stages(4), others=[bank])
    before = state_of(trainer)
    trainer.train()
    after, method = state_of(trainer), method_of(trainer)
    changed = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert any(".schema_bank." in n for n in changed) and any(
        ".lora_experts.experts.banks" in n for n in changed
    )
    assert len(method.experts.roster) == 3 and all(info.skills for info in method.experts.roster)
    model, batch = trainer.model.eval(), batch_of()
    trainer.methods.eval()
    bank.set_routing("on")
    both = logits_of(model, **batch)
    bank.set_routing("removed")
    experts = logits_of(model, **batch)
    assert not torch.equal(both, experts)
    bank.detach()
    assert torch.equal(logits_of(model, **batch), experts)
    method.set_routing("removed")
    base = logits_of(model, **batch)
    assert not torch.equal(experts, base)
    method.detach()
    assert torch.equal(logits_of(model, **batch), base)


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_with_layer_routing_masked_a_skipped_block_takes_its_experts_with_it(
    tmp_path: Path, granularity: str
) -> None:
    """Experts train through the kept blocks; where nothing is skipped the model is that of the experts alone."""
    route = LayerRouting(keep=1, granularity=granularity, engine="masked", train_engine="masked", kd=False)
    trainer = trainer_of(tmp_path, LoraExperts(**SMALL), stages=stream_stages(4), others=[route])
    trainer.train()
    method = method_of(trainer)
    assert len(method.experts.roster) == 3
    for info in method.experts.roster:
        assert any(
            bool((method.experts.bank(s).expert(info.name).up != 0).any()) for s in method.experts.banks
        )
    model, batch = trainer.model.eval(), batch_of()
    trainer.methods.eval()
    routed = logits_of(model, **batch)
    route.set_routing("removed")
    dense = logits_of(model, **batch)
    assert not torch.equal(routed, dense)
    method.detach()
    route.detach()
    method.attach(describe(model))
    assert torch.equal(logits_of(model, **batch), dense)


def test_with_layer_routing_sparse_a_clear_error_names_the_cure(tmp_path: Path) -> None:
    route = LayerRouting(keep=1, granularity="token", engine="sparse", train_engine="sparse", kd=False)
    trainer = trainer_of(tmp_path, LoraExperts(**SMALL), others=[route], max_steps=2)
    with pytest.raises((ModelError, ConfigError), match="masked"):
        trainer.train()


def test_the_best_model_comes_back_with_the_experts_it_had(tmp_path: Path) -> None:
    """load_best_model_at_end, of a stream that grew after its best evaluation: roster, factors, router, all of it."""
    method = LoraExperts(**SMALL)
    trainer = trainer_of(
        tmp_path,
        method,
        stages=stream_stages(4),
        eval_dataset={skill: make_rows(8, seed=9) for skill in SKILLS},
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_sorting_loss",
        greater_is_better=False,
    )
    losses, kept = iter([5.0, 4.0, 3.0, 1.0, 2.0, 2.5]), {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            kept[state.global_step] = state_of(trainer), method.structure()

    trainer.add_callback(Keep())
    original = trainer.evaluation_loop

    def planned(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if "eval_sorting_loss" in output.metrics:
            output.metrics["eval_sorting_loss"] = next(losses)
        return output

    trainer.evaluation_loop = planned  # type: ignore[method-assign]
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-8") and sorted(kept)[-1] == 12
    assert len(kept[12][1]["roster"]["experts"]) == 3
    state, structure = kept[8]
    again = state_of(trainer)
    assert method.structure()["roster"] == structure["roster"] and len(method.experts.roster) == 2
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n].nan_to_num(-1), state[n].nan_to_num(-1)) for n in state)
    logits_of(trainer.model.eval(), **batch_of())


def test_what_an_evaluation_asks_for_at_the_end_of_a_skill_is_not_done_to_the_next(tmp_path: Path) -> None:
    """The evaluation after a segment's last step is about the expert whose skill is over."""
    method = LoraExperts(**SMALL, double_after=1, double_gain=0.99, max_rank=64)
    evaluation = {skill: make_rows(8, seed=9) for skill in SKILLS}
    trainer = trainer_of(
        tmp_path,
        method,
        stages=stream_stages(4),
        eval_dataset=evaluation,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    ranks = {info.number: info.rank for info in method.experts.roster}
    assert ranks == {0: 2, 1: 3, 2: 3}
