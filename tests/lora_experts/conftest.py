"""Small random models with experts that do something, and a trainer over skills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from headgate.data.collation import Collator
from headgate.experiments.run import quiet
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.stage import Stage
from headgate.models.anatomy import Anatomy, describe
from headgate.models.load import load_model
from headgate.modules.bayes_router import BASE, NOTHING, BayesRouter
from headgate.training.trainer import HeadgateTrainer

from ..training.arguments import arguments_in
from ..training.conftest import make_rows

FAMILIES = ["llama", "qwen2", "gemma3", "gpt2"]


def model_of(family: str = "llama", lora: bool = False) -> tuple[Any, Anatomy]:
    model, _ = load_model(f"random:{family}", lora={"dropout": 0.0} if lora else None, seed=1, device="cpu")
    return model.eval(), describe(model)


def attached(anatomy: Anatomy, *, loud: bool = True, **options: Any) -> LoraExperts:
    """Attached experts, their factors and router rows large enough to be seen in the logits."""
    method = LoraExperts(**options)
    method.seed = 3
    method.attach(anatomy)
    if loud:
        louden(method)
    return method.eval()


@torch.no_grad()
def louden(method: LoraExperts, seed: int = 5) -> None:
    """No factor is zero and the gates differ from token to token."""
    stream = torch.Generator().manual_seed(seed)
    for name, tensor in [*method.experts.banks.named_parameters(), *method.experts.banks.named_buffers()]:
        if name.endswith("up"):
            tensor.copy_(torch.randn(tensor.shape, generator=stream) * 0.2)
    for tensor in method.experts.routers.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=stream) * 0.3)
    router = method.experts.routers.closed_form
    if isinstance(router, BayesRouter):
        for name in [BASE, *(info.name for info in method.experts.roster)]:
            if name not in router.owners:
                documents = torch.randint(3, 1000, (20, 30), generator=stream)
                router.learn(name, F.pad(documents, (0, 1), value=NOTHING).flatten())


def batch_of(rows: int = 3, length: int = 9, left: bool = False, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, : min(row * 2, length - 1)] = 0
    return {"input_ids": ids, "attention_mask": mask if left else mask.flip(1)}


@torch.no_grad()
def logits_of(model: Any, **batch: Any) -> Tensor:
    return model(**batch).logits


SKILLS = ("adding", "sorting", "counting")


def stream_stages(steps: int = 4, skills: tuple[str, ...] = SKILLS) -> list[Stage]:
    """One stage a skill; ``trainer_of`` says what trains in it."""
    return [
        Stage(name=f"{i}:{skill}", steps=steps, train={}, data=f"{i}:{skill}", options={"skill": skill})
        for i, skill in enumerate(skills)
    ]


def trainer_of(
    folder: Path, method: Any, *, stages: list[Stage] | None = None, **arguments: Any
) -> HeadgateTrainer:
    """A trainer on a random Llama without PEFT; with ``stages``, every skill has rows of its own."""
    lora = arguments.pop("lora", None)
    others = arguments.pop("others", [])
    evaluation = arguments.pop("eval_dataset", None)
    rows, columns = arguments.pop("rows", None), arguments.pop("columns", ())
    replay = arguments.pop("replay", None)
    if arguments.pop("checkpointing", False):
        model, tokenizer = load_model(
            "random:llama", lora=lora, seed=1, device="cpu", activation_checkpointing=True
        )
    else:
        model, tokenizer = load_model("random:llama", lora=lora, seed=1, device="cpu")
    data: Any = make_rows()
    if stages is not None:
        rates = {g: lr for m in (method, *others) for g, lr in m.group_learning_rates(1e-2).items()}
        stages = [stage.model_copy(update={"train": rates}) for stage in stages]
        data = rows or {s.name: make_rows(seed=SKILLS.index(s.options["skill"])) for s in stages}
        arguments.setdefault("max_steps", sum(stage.steps or 0 for stage in stages))
    trainer = HeadgateTrainer(
        model=model,
        args=arguments_in(
            folder / "out",
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_steps": 1000,
                "seed": 3,
                "warmup_steps": 0,
                **arguments,
            },
        ),
        train_dataset=data,
        eval_dataset=evaluation,
        data_collator=Collator(tokenizer.pad_token_id, columns),
        replay=replay,
        methods=[method, *others],
        stages=stages,
    )
    quiet(trainer)
    return trainer


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
