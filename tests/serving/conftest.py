"""Live models whose methods do something, exported; and a Python in which neither Headgate nor PEFT can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.experiments.served import save_served
from headgate.methods.base import Method
from headgate.methods.compose import MethodStack
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.schema_bank import SchemaBank

from ..cli.test_cli import here, recipe, run_directory
from ..layer_routing.conftest import batch_of, model_of
from ..lora_experts.conftest import louden

ELSEWHERE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split('.')[0] in ('headgate', 'peft')
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in ('headgate', 'peft'):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f'{name} is importable: this proves nothing')
"""


def routed(family: str = "llama", **options: Any) -> tuple[Any, Any, LayerRouting]:
    """A model with an adapter and routed blocks, about half of the gates closed, different ones for different tokens."""
    model, tokenizer, anatomy = model_of(family)
    method = LayerRouting(**{"policy": "gumbel", "granularity": "token", "kd": False, **options})
    method.seed = 3
    method.attach(anatomy)
    stream = torch.Generator().manual_seed(7)
    for parameter in [*method.patches.parameters(), *(method.router.parameters() if method.router else ())]:
        parameter.data = torch.randn(parameter.shape, generator=stream) * (0.5 if parameter.ndim > 1 else 0.1)
    with_methods(model, method)
    if method.router is not None:
        model(**batch_of())
        assert method.route is not None and method.route.logits is not None
        method.budget.set_threshold(method.route.logits.median())
    return model, tokenizer, method


def with_methods(model: Any, *methods: Method) -> Any:
    """As ``hg.load`` leaves a model."""
    stack = MethodStack(methods)
    stack.eval()
    object.__setattr__(model, "headgate_methods", stack)
    return model.eval()


def with_experts(family: str = "llama", **options: Any) -> tuple[Any, Any, LoraExperts]:
    model, tokenizer, anatomy = model_of(family, lora=False)
    method = LoraExperts(**{"experts": 3, "r": 3, "alpha": 6, **options})
    method.seed = 3
    method.attach(anatomy)
    louden(method)
    return with_methods(model, method), tokenizer, method


def with_schemas(family: str = "llama", **options: Any) -> tuple[Any, Any, SchemaBank]:
    model, tokenizer, anatomy = model_of(family)
    method = SchemaBank(**{"num_schemas": 6, "rank": 3, "init_std": 0.3, "eval_routing": "on", **options})
    method.seed = 3
    method.attach(anatomy)
    return with_methods(model, method), tokenizer, method


def exported(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True)
    assert save_served(model, tokenizer, folder, **options) == []
    return folder


def elsewhere(script: str, folder: Path) -> str:
    """What a script prints where Headgate and PEFT are not installed."""
    code = ELSEWHERE + script
    env = {**os.environ, "HF_HOME": str(folder / "hub"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, env=env, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def blocks_run(model: Any, base: Any) -> tuple[list[int], Any]:
    """A list that receives the number of every block whose MLP runs, and what to call to stop."""
    ran: list[int] = []
    layers = base.model.layers if hasattr(base, "model") else base.transformer.h
    handles = [
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(layers)
    ]
    return ran, lambda: [handle.remove() for handle in handles]


def trained(folder: Path, **changes: Any) -> Path:
    done = here(
        "train", recipe(folder, training__max_steps=4, training__save_every=4, evaluation=[], **changes)
    )
    assert done.returncode == 0, done.stderr
    return run_directory(folder)


@pytest.fixture(scope="session")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"policy": "gumbel", "granularity": "token", "target_utilization": 0.6, "router_lr": 0.05}
    return trained(tmp_path_factory.mktemp("token"), methods={"layer_routing": options})


@pytest.fixture(scope="session")
def with_mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"policy": "static", "skip": [1, 2]}
    return trained(
        tmp_path_factory.mktemp("mask"),
        model__name_or_path="random:gemma3",
        methods={"layer_routing": options},
    )


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stream = [
        {
            "skill": family,
            "source": "wordmath",
            "options": {"families": [family]},
            "limit": 60,
            "validation_share": 0.3,
        }
        for family in ("sports", "farm")
    ]
    return trained(
        tmp_path_factory.mktemp("experts"),
        data={"stream": stream, "max_length": 256},
        lora=None,
        methods={"lora_experts": {"r": 2, "new_r": 2, "new_alpha": 4, "maturity_steps": 1}},
    )
