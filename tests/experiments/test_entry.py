"""Arms that a user's own code trains: judged like any other, and each way of being wrong told in one line."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from headgate.errors import ConfigError, HeadgateError, TrainingError
from headgate.experiments.compare import Comparison
from headgate.experiments.preflight import check_recipe
from headgate.experiments.recipe_file import recipe_from
from headgate.experiments.run import run

MODULE = """
import torch
import transformers

not_a_function = 3


def train(job):
    rate, size = job.arguments.learning_rate, job.arguments.per_device_train_batch_size
    optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad], lr=rate)
    job.model.train()
    for step in range(job.arguments.max_steps):
        rows = [job.train[(step * size + i) % len(job.train)] for i in range(size)]
        job.model(**job.collator(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def lazy(job):
    job.model.eval()


def nonsense(job):
    train(job)
    return {"loss": 0.0}


def not_numbers(job):
    train(job)
    with torch.no_grad():
        next(p for p in job.model.parameters() if p.requires_grad).fill_(float("nan"))


def thaws(job):
    job.model.requires_grad_(True)
    train(job)


def two(job, more):
    pass


def breaks(job):
    return job.nothing


def moves_the_base(job):
    train(job)
    with torch.no_grad():
        next(p for p in job.model.parameters() if not p.requires_grad).add_(0.1)


class Quiet(transformers.Trainer):
    pass


class Never(transformers.Trainer):
    def train(self, *args, **kwargs):
        return None


class Divides(transformers.Trainer):
    def compute_loss(self, *args, **kwargs):
        return 1 / 0
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, as a new user has one."""
    monkeypatch.chdir(tmp_path)
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def recipe(entry: str | None, **changes: Any) -> Any:
    content: dict[str, Any] = {
        "name": "entry",
        "model": {"device": "cpu"},
        "lora": {"r": 2, "dropout": 0.0},
        "data": {
            "train": {"source": "wordmath", "limit": 24},
            "validation": {"source": "wordmath", "split": "validation", "limit": 8},
        },
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "evaluation": [
            {"task": "perplexity", "source": "wordmath", "split": "test", "limit": 6, "label": "held"}
        ],
    }
    return recipe_from({**content, **({} if entry is None else {"entry": entry}), **changes})


@pytest.mark.parametrize("name", ["train", "Quiet"])
def test_a_run_of_ones_own_code_is_a_run(mine: str, name: str) -> None:
    directory = run(recipe(f"{mine}:{name}"))
    training = directory.result()["training"]
    assert directory.verified
    assert training["steps"] == 3
    assert training["trained_tokens"] > 0 and training["flops"] > 0 and training["seconds"] > 0
    assert math.isfinite(training["eval_loss"]) and training["trainable_parameters"] > 0


def test_a_bare_trainer_counts_what_headgates_own_counts(mine: str) -> None:
    """Same data, steps and adapter: the same tokens and FLOPs, seen from outside and from inside."""
    data = {
        "train": {"source": "wordmath", "limit": 24},
        "validation": {"source": "wordmath", "split": "validation", "limit": 8},
        "group_by_length": False,  # Headgate's own order of lengths is not transformers'
    }
    theirs = run(recipe(f"{mine}:Quiet", data=data)).result()["training"]
    ours = run(recipe(None, data=data)).result()["training"]
    assert theirs["trained_tokens"] == ours["trained_tokens"]
    assert theirs["flops"] == pytest.approx(ours["flops"], rel=1e-6)
    assert theirs["eval_loss"] == pytest.approx(ours["eval_loss"], rel=1e-4)


def test_it_is_an_arm(mine: str) -> None:
    arms = {"lora": {}, "mine": {"entry": f"{mine}:train"}, "lora_equal": {"equal_time": "mine"}}
    compared = recipe(
        None, compare={"seeds": [1, 2], "baseline": "lora", "metric": "evaluation.held.loss", "arms": arms}
    )
    report = Comparison(compared).execute()
    assert set(report["contrasts"]) == {"mine", "lora_equal"}
    assert report["arms"]["mine"]["verified"] and report["arms"]["mine"]["cost"]["steps"] == 3
    assert report["arms"]["lora_equal"]["equal_time"]["of"] == "mine"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("nowhere_at_all:train", r"no module 'nowhere_at_all': run from the folder that holds nowhere_at_all\.py"),
        ("{mine}:trian", r"has no function 'trian': it has train, lazy"),
        ("{mine}:not_a_function", r"has no function 'not_a_function'"),
        ("{mine}:two", r"is called with one argument, the job: missing a required argument: 'more'"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_said_before_a_model_is_loaded(mine: str, entry: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_recipe(recipe(entry.format(mine=mine)))


@pytest.mark.parametrize("entry", ["mine", "mine.train", ":train", "a b:c", "mine:"])
def test_what_is_no_name_is_an_error_of_the_recipe(entry: str) -> None:
    with pytest.raises(ConfigError, match="entry"):
        recipe(entry)


def test_a_module_that_breaks_names_its_line(mine: str) -> None:
    Path("broken_module.py").write_text("x = 1\nraise RuntimeError('no licence')\n")
    with pytest.raises(ConfigError, match=r"in broken_module\.py, line 2: RuntimeError: no licence"):
        check_recipe(recipe("broken_module:train"))
    Path("needs_more.py").write_text("import nobody_has_this\n")
    with pytest.raises(ConfigError, match=r"no module 'nobody_has_this': install nobody_has_this"):
        check_recipe(recipe("needs_more:train"))


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": {"backward_gate": {}}},
        {"data": {"train": {"source": "wordmath", "limit": 24}, "packing": True}},
        {
            "training": {"max_steps": 3, "early_stopping": {}},
            "data": {"train": {"source": "wordmath"}, "validation": {"source": "wordmath"}},
        },
    ],
)
def test_what_only_headgates_trainer_does_is_refused(mine: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="trains with its own code"):
        check_recipe(recipe(f"{mine}:train", **changes))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lazy", "trained nothing: all"),
        ("Never", "trained nothing: all"),
        ("nonsense", r"returned \{'loss': 0.0\}: train job.model in place and return nothing"),
        ("not_numbers", "with numbers that are not finite"),
        ("thaws", "changed which weights are trained"),
        ("breaks", r"failed in mine_\w+\.py, line \d+: AttributeError: 'Job' object has no attribute 'nothing'"),
        ("Divides", r"failed in mine_\w+\.py, line \d+: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_it_does_wrong_is_one_line_and_no_result(mine: str, name: str, said: str) -> None:
    with pytest.raises(TrainingError, match=said) as caught:
        run(recipe(f"{mine}:{name}"))
    assert "\n" not in str(caught.value)


def test_a_base_that_was_moved_under_its_adapter_is_found(mine: str) -> None:
    """The adapter alone is saved: what is loaded again is not what was measured."""
    assert not run(recipe(f"{mine}:moves_the_base")).verified


def test_a_changed_function_is_another_input(mine: str) -> None:
    run(recipe(f"{mine}:train"))
    Path(f"{mine}.py").write_text(MODULE + "\n# another optimizer\n")
    with pytest.raises(HeadgateError, match="entry changed"):
        run(recipe(f"{mine}:train"))
