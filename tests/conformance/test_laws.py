"""Every method of Headgate, and one from a package of its own, keeps every law; and each law is able to fall."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.config import StrictConfig
from headgate.errors import ConfigError
from headgate.experiments.recipe_file import load_recipe
from headgate.experiments.run import run
from headgate.methods.base import Method
from headgate.methods.names import METHODS
from headgate.methods.registry import method_class, register_method
from headgate.methods.step import Step
from headgate.models.surgery import on_block_output
from headgate.testing import LawsBroken, conform, examine
from headgate.testing.conformance import LawResult
from headgate.testing.law import LAWS
from headgate.training.processes import world_size
from headgate.training.saved import load

from .examined import NAMES

QUICK = ["what is saved is what was live", "neutral settings change no loss", "every setting is documented"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "law", [pytest.param(law, marks=[] if law in QUICK else [pytest.mark.slow]) for law in LAWS]
)
def test_laws(name: str, law: str) -> None:
    (result,) = examine(name, laws=[law])
    assert result.verdict != "broken", result.detail


class Scaled(Method):
    """Scales a block's output by a learned number: the smallest method that does something, and keeps the laws."""

    name = "conform_scaled"

    class Config(StrictConfig):
        """``start``: the factor at first."""

        start: float = 1.0

    attach_order = 70

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.factor = nn.Parameter(torch.tensor(self.config.start))

    def attach(self, anatomy: Any) -> None:
        self.handles.append(on_block_output(anatomy.blocks[-1], self.changed))

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"factor": [self.factor]}


class Forgetful(Scaled):
    """Keeps state outside its buffers: what is loaded is another function."""

    name = "conform_forgetful"
    bias = 0.0

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor + self.bias

    def on_step_end(self, step: Step) -> dict[str, Tensor]:
        self.bias += 0.01
        return {}


class Clinging(Scaled):
    """Leaves its hook in the model."""

    name = "conform_clinging"

    def attach(self, anatomy: Any) -> None:
        on_block_output(anatomy.blocks[-1], lambda hidden: hidden * 1.5)
        super().attach(anatomy)


class Restless(Scaled):
    """Draws what no seed decides; torch's own stream is seeded anew at every micro-batch."""

    name = "conform_restless"

    def on_step_start(self, step: Step) -> None:
        self.noise = time.perf_counter() % 1

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor * (1 + 0.1 * getattr(self, "noise", 0.0) * self.training)


class Undocumented(Scaled):
    name = "conform_undocumented"

    class Config(StrictConfig):
        start: float = 1.0
        mystery: int = 3


class Orphaned(Scaled):
    """A trainable tensor in no group would be frozen in silence."""

    name = "conform_orphaned"

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.lost = nn.Parameter(torch.zeros(()))


class Chatty(Scaled):
    """Logs a name that nobody declared."""

    name = "conform_chatty"

    def on_step_end(self, step: Step) -> dict[str, Tensor]:
        return {"somebodys number": torch.zeros(())}


class LookingRight(Scaled):
    """Mixes in the last position of the row: padding changes it."""

    name = "conform_looking_right"

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor + 0.5 * hidden[:, -1:]


class Greedy(Scaled):
    """Learns from what was rejected."""

    name = "conform_greedy"

    def on_step_end(self, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            self.factor.add_(0.01)
        return {}


class Asking(Scaled):
    """Reads its factor back at every forward: an accelerator would wait for it."""

    name = "conform_asking"

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * float(self.factor.detach()) * (1 if self.factor.tolist() else 0) + 0 * self.factor


class Lonely(Scaled):
    """Every rank follows its own rows."""

    name = "conform_lonely"

    def on_step_end(self, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            self.factor.add_(step.batch["input_ids"].float().mean() * 1e-5)
        return {}


class Summing(Scaled):
    """Its share of the loss grows with the number of ranks: they agree with each other, and with no single process."""

    name = "conform_summing"

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"conform_summing": 0.1 * world_size() * self.factor.square()}


BROKEN = {
    Forgetful: "what is saved is what was live",
    Clinging: "detached is as if never attached",
    Restless: "a seed repeats a run",
    Undocumented: "every setting is documented",
    Orphaned: "groups cover what trains",
    Chatty: "telemetry has declared names",
    LookingRight: "padding changes nothing",
    Greedy: "a rejected batch moves nothing",
    Asking: "host reads stay within budget",
    Lonely: "two ranks are one process",
    Summing: "two ranks are one process",
}


@cache
def verdict_of_the_sound_one(law: str) -> LawResult:
    (result,) = examine(Scaled, laws=[law])
    return result


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_planted_fault_breaks_its_law(kind: type[Method]) -> None:
    (result,) = examine(kind, laws=[BROKEN[kind]])
    assert result.verdict == "broken", f"{kind.__doc__} and nobody noticed"
    sound = verdict_of_the_sound_one(BROKEN[kind])
    assert sound.verdict == "kept", sound.detail


def test_conform_raises_with_the_list() -> None:
    with pytest.raises(LawsBroken, match=r"conform_undocumented breaks \d of \d+ laws") as caught:
        conform(Undocumented, laws=QUICK)
    assert any(result.law == "every setting is documented" for result in caught.value.results)


def test_the_command_says_it_with_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headgate.testing"]
    done = subprocess.run(
        [*command, "ewc", "--law", "every setting is documented", "--json", str(tmp_path / "laws.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 laws, 0 broken" in done.stdout, done.stderr
    assert json.loads((tmp_path / "laws.json").read_text())["conforms"] is True
    assert subprocess.run([*command, "no_such_method"], capture_output=True, text=True).returncode == 2


def test_a_registered_method_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    """Named in a recipe, found again by its checkpoint; a taken name is refused; an unknown one lists what there is."""
    if "conform_scaled" not in METHODS.names():
        register_method(Scaled)
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}\nmodel: {{name_or_path: 'random:llama', device: cpu}}\n"
        "data: {train: {source: wordmath, limit: 16}, validation: {source: wordmath, split: validation, limit: 4}, max_length: 256}\n"
        "training: {max_steps: 3, per_device_train_batch_size: 2}\nmethods: {conform_scaled: {start: 1.1}}\n"
    )
    directory = run(load_recipe(tmp_path / "recipe.yaml"))
    assert directory.verified
    model, _ = load(directory.path)
    assert model.headgate_methods.by_name["conform_scaled"].factor != 1.1
    other = type("Other", (Scaled,), {"name": "ewc"})
    with pytest.raises(ConfigError, match="there is a method 'ewc' already"):
        register_method(other)
    with pytest.raises(
        ConfigError, match=r"unknown method 'lsia': did you mean 'lisa'\? installed are .*headgate\.methods"
    ):
        method_class("lsia")
