"""A run that searches its mask by training: phases, the start at the mask, and what a useless router ends at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy

from headgate.data.collation import Collator
from headgate.errors import ConfigError
from headgate.experiments.run import quiet
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.layer_routing.masks import best_mask, drawn_mask, greedy_mask, masks_of
from headgate.methods.layer_routing.route import Route
from headgate.modules.layer_router import LayerRouter
from headgate.ops.randomness import generator
from headgate.training.trainer import HeadgateTrainer

from ..training.arguments import arguments_in
from ..training.conftest import make_rows
from .conftest import batch_of, model_of
from .test_training import method_of, trainer_of

TOKEN: dict[str, Any] = {
    "granularity": "token",
    "start": "mask",
    "target_utilization": 0.75,
    "kd": False,
    "search_share": 0.25,
    "adapt_share": 0.25,
    "trial_share": 0.25,
}
STATIC: dict[str, Any] = {
    "policy": "static",
    "search": "trained",
    "target_utilization": 0.75,
    "search_share": 0.25,
}


def held_out(folder: Path, options: dict[str, Any], eval_steps: int = 0, **arguments: Any) -> Any:
    trainer = trainer_of(folder, options, **{"max_steps": 8, **arguments})
    trainer.eval_dataset = make_rows()
    if eval_steps:
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, eval_steps
    return trainer


def test_bounded_logits_stay_within_and_start_where_they_should() -> None:
    router = LayerRouter(16, 3, init_keep=0.8, bound=3.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(torch.sigmoid(router(x)), torch.full((2, 5, 3), 0.8))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(50.0)
    assert float(router(x).detach().abs().max()) <= 3.0
    router.start_at(torch.tensor([1.0, 0.0, 1.0]), 2.0)
    torch.testing.assert_close(router(x), torch.tensor([2.0, -2.0, 2.0]).expand(2, 5, 3))
    with pytest.raises(ValueError, match="not below the bound"):
        router.start_at(torch.ones(3), 3.0)


@pytest.mark.parametrize("units", [1, 2])
def test_the_search_is_exhaustive_where_masks_are_few_and_a_beam_beats_greed(units: int) -> None:
    """A loss under which the best pair is not made of the best single block: greed misses it, both searches do not."""
    alone = {0: 0.0, 1: 1.0, 2: 1.0, 3: 5.0}

    def loss(mask: Tensor) -> float:
        shut = tuple(p for p in range(len(mask) // units) if not mask[p * units])
        return -9.0 if shut == (1, 2) else sum(alone.get(p, 6.0) for p in shut)

    def shut(mask: Tensor) -> list[int]:
        return [p for p in range(len(mask) // units) if not mask[p * units]]

    assert shut(best_mask(loss, 4, 2, units)) == [1, 2]
    assert 0 in shut(greedy_mask(loss, 4, 2, units))
    assert len(masks_of(14, 2, units)) == 64  # 91 masks: too many to try
    assert shut(best_mask(loss, 14, 2, units)) == [1, 2]


def test_drawn_masks_close_as_many_as_asked_and_each_alike() -> None:
    stream = torch.Generator().manual_seed(0)
    drawn = torch.stack([drawn_mask(4, 2, 1, stream) for _ in range(3000)])
    assert (drawn.sum(1) == 2).all()
    patterns, counts = drawn.unique(dim=0, return_counts=True)
    assert len(patterns) == 6 and int(counts.min()) > 430


def test_phases_do_what_they_say(tmp_path: Path) -> None:
    """Random masks of the depth, then routing that starts at the best one of them, and just the budget all the while."""
    trainer = held_out(tmp_path, TOKEN)
    method, seen = method_of(trainer), []
    end = method.on_step_end

    def watch(step: Any) -> Any:
        route = method.route
        assert route is not None
        engine = method.execution.training_engine()
        bias = method.router.layers[-1].bias.detach().clone() if method.router is not None else None
        seen.append((step.stage.name, route.weight.detach().clone(), route.context.valid, engine, bias))
        return end(step)

    method.on_step_end = watch  # type: ignore[method-assign]
    trainer.train()
    assert [name for name, *_ in seen] == ["search"] * 2 + ["adapt"] * 2 + ["trial"] * 2 + ["settle"] * 2
    for name, weight, valid, engine, _ in seen:
        mean = weight.expand(*valid.shape, -1)[valid].mean()
        assert float(mean) == pytest.approx(2 / 3, abs=0.02), (
            name
        )  # 3/4 of 4 blocks: 2 of the 3 routable ones
        assert engine == ("sparse" if name in ("search", "adapt") else "masked") or method.choosing.settled
    assert all(weight.shape[:2] == (1, 1) for name, weight, *_ in seen if name == "search")
    assert method.fallback is not None
    first = next(bias for name, *_, bias in seen if name == "trial")
    assert first is not None  # after its first step: still on the side of its mask
    assert ((first > 0).float() == method.fallback.mask).all() and int((1 - method.fallback.mask).sum()) == 1


def test_the_mask_is_the_one_that_validation_likes_best(tmp_path: Path) -> None:
    trainer = held_out(tmp_path, STATIC, max_steps=6)
    method, losses = method_of(trainer), {}
    begin = method.on_stage_start

    def watch(scheduled: Any, probe: Any) -> None:
        if scheduled.name == "adapt":
            batches = list(probe.validation)
            for mask in masks_of(3, 1, 1):
                losses[tuple(mask.tolist())] = method.execution.loss(batches, mask)
        begin(scheduled, probe)

    method.on_stage_start = watch  # type: ignore[method-assign]
    trainer.train()
    assert len(losses) == 3 and len(set(losses.values())) == 3
    assert tuple(method.fixed.tolist()) == min(losses, key=losses.__getitem__)


class Useless(LayerRouting):
    """Its router says nothing of the token: logits by chance."""

    def decide(self, hidden: Tensor, context: Any, training: bool) -> Route:
        if self.router is not None:
            draw = generator(0, int(context.valid.sum()), "useless")
            self.router.forward = (
                lambda x: torch.randn(  # type: ignore[method-assign]
                    *x.shape[:2], len(self.blocks), generator=draw
                )
            )
        return super().decide(hidden, context, training)  # type: ignore[return-value]


def test_a_useless_router_ends_at_the_masks_loss(tmp_path: Path) -> None:
    """The run settles on its mask and trains it: what it serves is the mask, and no worse than the mask run beside it."""
    few = make_rows(4).select([0, 1, 2, 3] * 16)  # something to learn
    static = LayerRouting(**{**STATIC, "keep": 1, "search_share": 0.1})
    useless = Useless(**{**TOKEN, "keep": 1, "adapt_share": 0.35, "search_share": 0.1, "trial_share": 0.1})
    plain, trainer = (
        HeadgateTrainer(
            model=model_of()[0],  # of blocks that matter
            args=arguments_in(
                tmp_path / name,
                max_steps=40,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                save_strategy="no",
                seed=3,
            ),
            train_dataset=few,
            eval_dataset=few.select(range(4)),
            data_collator=Collator(0),
            methods=[method],
        )
        for name, method in (("a", static), ("b", useless))
    )
    for run in (plain, trainer):
        quiet(run)
        run.train()
    assert useless.choosing.settled and useless.fallback is not None
    assert torch.equal(useless.fallback.mask, static.fixed), "the same search finds the same mask"
    router, mask = useless.fallback.losses.tolist()
    assert router > mask
    ours, theirs = trainer.evaluate()["eval_loss"], plain.evaluate()["eval_loss"]
    batches = list(trainer.get_eval_dataloader())
    assert ours == pytest.approx(useless.execution.loss(batches, useless.fallback.mask), rel=1e-5)
    assert useless.summary()["routing_in_use"] == "mask"
    assert ours < mask, "it went on training"
    assert ours <= theirs + 0.05, (ours, theirs)
    trainer.model.train()
    trainer.model(**batch_of())
    assert useless.route is not None and useless.route.logits is None, "training goes on under the mask"


SAMPLE = {**TOKEN, "granularity": "sample"}


@pytest.mark.parametrize(
    ("options", "step"), [(TOKEN, 1), (TOKEN, 2), (TOKEN, 4), (TOKEN, 7), (SAMPLE, 5), (STATIC, 1)]
)
def test_killed_in_any_phase_and_resumed_is_undisturbed(
    tmp_path: Path, options: dict[str, Any], step: int
) -> None:
    arguments = {"save_steps": 1, "eval_steps": 1}
    whole = held_out(tmp_path / "a", options, **arguments)
    whole.train()
    again = held_out(tmp_path / "a", options, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / f"checkpoint-{step}"))
    ours, theirs = whole.methods.state_dict(), again.methods.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_what_it_reads_between_stages_is_counted(tmp_path: Path) -> None:
    """Three masks over the validation rows: three quarters of a forward each, besides what the steps cost."""
    trainer = held_out(tmp_path, STATIC, max_steps=6)
    method = method_of(trainer)
    taken: list[Any] = []
    take = method.take_readings

    def watch() -> Any:
        read = list(take())
        taken.extend(read)
        return read

    method.take_readings = watch  # type: ignore[method-assign]
    trainer.train()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in trainer.get_eval_dataloader())
    assert [read.tokens for read in taken] == [tokens] * 3
    assert [read.share for read in taken] == [0.75] * 3


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"policy": "topk", "start": "mask"}, "budget: exact opens"),
        ({"policy": "gumbel", "start": "mask", "budget": "lagrangian"}, "start: mask needs"),
        ({"start": "mask", "search_share": 0.6, "trial_share": 0.4}, "leave no step to settle in"),
        ({"policy": "static", "search": "trained", "skip": [1]}, "search: trained finds"),
        ({"logit_bound": 2.0}, "logit_bound=2 is not above"),
    ):
        with pytest.raises(ConfigError, match=words):
            LayerRouting(**options)
    with pytest.raises(ConfigError, match=r"chooses on validation rows.*give data.validation"):
        trainer_of(tmp_path / "a", TOKEN, max_steps=8).train()
    trainer = held_out(tmp_path / "b", TOKEN)
    trainer.stages._given = [*method_of(trainer).stages(1e-2)]
    trainer.stages._given = [s.model_copy(update={"options": {}}) for s in trainer.stages._given]
    with pytest.raises(ConfigError, match="this run has stages of its own"):
        trainer.train()
