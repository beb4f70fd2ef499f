"""A result is what its inputs and its seeds make it: changed inputs, a lost race, a forged path, a doubled seed."""

from __future__ import annotations

import json
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.errors import CheckpointError, ConfigError, TrainingError
from headgate.experiments import run as run_module
from headgate.experiments.compare import Comparison
from headgate.experiments.environment import environment
from headgate.experiments.recipe_file import recipe_from
from headgate.experiments.redaction import command_line, published, shown_path
from headgate.experiments.run import run
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.verification import failures, verify_run


def rows_in(path: Path, shift: int = 0, count: int = 24) -> Path:
    lines = [
        json.dumps(
            {"prompt": f"{i} plus {shift} is", "completion": f" {i + shift}", "answer": str(i + shift)}
        )
        for i in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def content_of(folder: Path, **training: Any) -> dict[str, Any]:
    return {
        "name": "trust",
        "output_dir": str(folder / "runs"),
        "model": {"name_or_path": "random:llama", "device": "cpu"},
        "lora": {"r": 2},
        "data": {
            "train": {"source": "auto", "path": str(folder / "train.jsonl")},
            "validation": {"source": "auto", "path": str(folder / "held.jsonl"), "split": "validation"},
            "max_length": 64,
        },
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "save_every": 1,
            "eval_every": 2,
            **training,
        },
        "evaluation": [
            {"task": "perplexity", "source": "auto", "path": str(folder / "held.jsonl"), "lengths": [32]},
            {
                "task": "exact_match",
                "source": "auto",
                "path": str(folder / "held.jsonl"),
                "max_new_tokens": 3,
            },
        ],
        "logging_every": 1,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows_in(tmp_path / "train.jsonl")
    rows_in(tmp_path / "held.jsonl", shift=100, count=6)
    return tmp_path


@pytest.mark.parametrize("which", ["train.jsonl", "held.jsonl"])
def test_a_replaced_file_is_refused_with_the_cure(folder: Path, which: str) -> None:
    """Complete or half-done, read for training or for evaluation only."""
    recipe = recipe_from(content_of(folder))
    directory = run(recipe)
    assert directory.verified, failures(directory.verification() or {})
    rows_in(folder / which, shift=7)
    with pytest.raises(CheckpointError, match=r"other inputs: .*(data|evaluation).* changed since.*--fresh"):
        run(recipe)
    assert not verify_run(directory)["verified"]
    rows_in(
        folder / which, shift=0 if which == "train.jsonl" else 100, count=24 if which == "train.jsonl" else 6
    )
    assert run(recipe).status == "complete", "put back, it is the same run again"
    rows_in(folder / which, shift=7)
    assert run(recipe, fresh=True).verified


def test_replaced_base_weights_and_tokenizer_are_refused(folder: Path) -> None:
    from headgate.models.load import load_model

    for name in ("base", "other"):
        model, tokenizer = load_model("random:llama", seed=1 if name == "base" else 2, device="cpu")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    content = content_of(folder)
    content["model"]["name_or_path"] = str(folder / "base")
    recipe = recipe_from(content)
    run(recipe)
    weights = (folder / "base" / "model.safetensors").read_bytes()
    shutil.copy(folder / "other" / "model.safetensors", folder / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.name_or_path changed"):
        run(recipe)
    (folder / "base" / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "base" / "tokenizer_config.json").read_text())
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 17}))
    with pytest.raises(CheckpointError, match=r"model\.name_or_path changed"):
        run(recipe)


def test_a_resume_refuses_other_inputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from(content_of(folder))

    def stop(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(run_module, "evaluate", stop)
    with pytest.raises(RuntimeError):
        run(recipe)
    monkeypatch.undo()
    rows_in(folder / "train.jsonl", shift=3)
    with pytest.raises(CheckpointError, match=r"data\.train changed"):
        run(recipe)


def test_who_waited_for_the_lock_looks_at_the_status_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may finish the run between a first look and the lock: it is then not trained a second time."""
    recipe = recipe_from(content_of(folder))
    finished = run(recipe)
    kept = folder / "kept"
    shutil.move(finished.path, kept)
    held = RunDirectory.held

    def finish_before(self: RunDirectory) -> Any:
        shutil.move(kept, finished.path)  # what the holder of the lock did before letting it go
        return held(self)

    monkeypatch.setattr(RunDirectory, "held", finish_before)
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("trained a complete run again"))
    assert run(recipe).status == "complete"


def test_one_writer_at_a_time(folder: Path) -> None:
    from headgate.errors import RunBusy

    recipe = recipe_from(content_of(folder))
    directory = RunDirectory.of(recipe)
    with directory.held():
        raised: list[BaseException] = []

        def other() -> None:
            try:
                run(recipe)
            except RunBusy as error:
                raised.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(raised) == 1


@pytest.mark.parametrize(
    "name",
    ["../elsewhere", "a/b", "/etc/passwd", "..", ".hidden", "a\\b", "", "x" * 121, "trailing.", "a\nb"],
)
def test_names_that_leave_their_folder_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="name"):
        recipe_from({**content_of(folder), "name": name})
    content = content_of(folder)
    content["evaluation"][0]["label"] = name
    with pytest.raises(ConfigError, match="label"):
        recipe_from(content)


def test_a_run_keeps_no_secret_and_names_nobodys_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "Ab3" * 11
    monkeypatch.setattr(
        "sys.argv",
        ["headgate", "train", str(folder / "recipe.yaml"), "--set", f"hub_token={secret}", "--token", "s3cret", "--set",
         f"tracker.api_key=abc{1}", f"https://me:pw@host/{secret}"],
    )  # fmt: skip
    directory = run(recipe_from(content_of(folder)))
    for file in ("env.json", "checkpoint/README.md"):
        text = (directory.path / file).read_text()
        for leak in (secret, "s3cret", "abc1", "me:pw", str(folder)):
            assert leak not in text, f"{leak} in {file}"
    assert "train.jsonl" in (directory.path / "checkpoint" / "README.md").read_text()
    assert environment()["command"][0] == "headgate"


def test_redaction_leaves_the_rest_alone() -> None:
    assert (
        command_line(["headgate", "train", "a.yaml", "--set", "training.max_steps=3"])[-1]
        == "training.max_steps=3"
    )
    assert shown_path(str(Path.cwd() / "data" / "x.jsonl")) == "data/x.jsonl"
    assert shown_path("/home/me/x.jsonl") == ".../x.jsonl" and shown_path("plain text") == "plain text"
    assert published({"max_tokens": 3, "password": "p", "list": ["/a/b"]}) == {
        "max_tokens": 3,
        "password": "***",
        "list": [".../b"],
    }


def test_weights_have_the_mode_of_every_other_file(folder: Path) -> None:
    directory = run(recipe_from(content_of(folder)))
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.checkpoint.iterdir() if p.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_doubled_seeds_are_refused(folder: Path) -> None:
    compare = {"seeds": [1, 2, 1], "baseline": "lora", "arms": {"lora": {}}}
    with pytest.raises(ConfigError, match=r"compare\.seeds.*seed 1 stands twice"):
        recipe_from({**content_of(folder), "compare": compare})


def test_an_unverified_run_is_not_judged_unless_asked(folder: Path) -> None:
    """A live model that differs from what it saved: what the audit found, planted."""
    content = content_of(folder)
    content["compare"] = {
        "seeds": [1, 2],
        "baseline": "lora",
        "arms": {"lora": {}, "faster": {"training": {"learning_rate": 1e-3}}},
    }
    recipe = recipe_from(content)
    original = run_module.final_validation

    def stale(trainer: Any) -> dict[str, float]:
        return {name: value + 1e-6 for name, value in original(trainer).items()}

    run_module.final_validation = stale
    try:
        with pytest.raises(TrainingError, match=r"no verdict: 4 runs are not verified.*--allow-unverified"):
            Comparison(recipe).execute()
    finally:
        run_module.final_validation = original
    report = Comparison(recipe, allow_unverified=True).execute()
    assert not report["arms"]["lora"]["verified"]
    (checked,) = {
        c["name"]
        for d in [RunDirectory(Path(report["arms"]["lora"]["runs"]["1"]))]
        for c in verify_run(d)["checks"]
        if c["ok"] is False
    }
    assert checked == "eval_loss"


def test_verification_sees_a_weight_that_was_not_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live model is trained a little further than the file: predictions or losses of the saved one differ."""
    evaluate = run_module.evaluate

    def moved(model: Any, *rest: Any) -> Any:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.05)
        return evaluate(model, *rest)

    monkeypatch.setattr(run_module, "evaluate", moved)
    directory = run(recipe_from(content_of(folder)))
    record = directory.verification()
    assert record is not None and not record["verified"]
    assert any(check["name"].startswith("perplexity") and check["ok"] is False for check in record["checks"])


def test_a_routed_run_is_measured_alike_before_and_after_loading(tmp_path: Path) -> None:
    """With a cache to fill a routed block sums in another order: training validates without one, so must whoever loads."""
    recipe = recipe_from(
        {
            "name": "routed",
            "output_dir": str(tmp_path),
            "model": {"name_or_path": "embedded", "device": "cpu"},
            "data": {
                "train": {"source": "wordmath", "limit": 64},
                "validation": {"source": "wordmath", "split": "validation", "limit": 40},
                "max_length": 256,
            },
            "training": {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
            "methods": {
                "layer_routing": {
                    "policy": "gumbel",
                    "granularity": "token",
                    "keep": 1,
                    "router_lr": 1e-2,
                    "kd": False,
                }
            },
            "evaluation": [
                {"task": "perplexity", "source": "wordmath", "split": "test", "limit": 40, "lengths": [256]}
            ],
        }
    )
    record = run(recipe).verification()
    assert record is not None and record["verified"], failures(record)
