"""The real command line: run directories, resume after kill -9, and errors a newcomer can act on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
HEADGATE = [sys.executable, "-m", "headgate.cli.main"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def headgate(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HEADGATE, *map(str, arguments)], capture_output=True, text=True, env=ENV, cwd=cwd, timeout=300
    )


def here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same command line inside this process: seconds faster, for what needs no process of its own."""
    from headgate.cli.main import main

    stdout, stderr = io.StringIO(), io.StringIO()
    old, sys.argv = sys.argv, ["headgate", *map(str, arguments)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = old
    return subprocess.CompletedProcess(sys.argv, int(code or 0), stdout.getvalue(), stderr.getvalue())  # type: ignore[call-overload]


def recipe(folder: Path, **changes: object) -> Path:
    content = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"name_or_path": "random:llama"},
        "data": {
            "train": {"source": "wordmath", "limit": 40},
            "validation": {"source": "wordmath", "split": "validation", "limit": 8},
            "max_length": 256,
        },
        "training": {"max_steps": 8, "per_device_train_batch_size": 2, "save_every": 1, "eval_every": 4},
        "evaluation": [{"task": "perplexity", "source": "wordmath", "limit": 8, "lengths": [256]}],
        "logging_every": 1,
    }
    for dotted, value in changes.items():
        node = content
        *parents, last = dotted.split("__")
        for part in parents:
            node = node.setdefault(part, {})  # type: ignore[assignment]
        node[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_directory(folder: Path) -> Path:
    (found,) = (path for path in (folder / "runs" / "tiny").iterdir() if path.is_dir())
    return found


def test_train_writes_a_whole_run_directory_and_runs_once(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    done = headgate("train", path)
    assert done.returncode == 0, done.stderr
    assert "adapter" in done.stdout and "stage" in done.stdout and "eta" in done.stdout
    run = run_directory(tmp_path)
    for name in (
        "recipe.yaml",
        "env.json",
        "metrics.jsonl",
        "result.json",
        "predictions/perplexity_wordmath.jsonl",
    ):
        assert (run / name).exists(), name
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "headgate.json",
        "README.md",
        "manifest.json",
        "tokenizer.json",
    ):
        assert (run / "checkpoint" / name).exists(), name
    assert not (run / "trainer").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    result = json.loads((run / "result.json").read_text())
    assert result["training"]["steps"] == 8 and result["training"]["flops"] > 0
    assert "complete: nothing to do" in here("train", path).stdout
    shown = here("eval", run, "--task", "perplexity", "--limit", 8, "--length", 256)
    assert f"{result['evaluation']['perplexity_wordmath']['loss']:.4f}" in shown.stdout, shown.stderr
    assert here("generate", run, "--prompt", "Two", "--max-new-tokens", 3).returncode == 0


def test_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    """PEFT alone, in a process that never imports Headgate, sees the weights that Headgate's own loader sees."""
    assert here("train", recipe(tmp_path, model__name_or_path=str(_saved_model(tmp_path)))).returncode == 0
    run = run_directory(tmp_path)
    script = (
        "import torch, peft, transformers, sys\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"m = peft.PeftModel.from_pretrained(m, {str(run / 'checkpoint')!r}).eval()\n"
        f"torch.save(m(input_ids=torch.arange(3, 20)[None]).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'headgate' not in sys.modules\n"
    )
    plain = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENV)
    assert plain.returncode == 0, plain.stderr
    import headgate as hg

    model, _ = hg.load(run)
    ours = model(input_ids=torch.arange(3, 20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), ours)


def _saved_model(tmp_path: Path) -> Path:
    from headgate.models.load import load_model

    model, tokenizer = load_model("random:llama", device="cpu")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_anywhere_and_resumed_is_bitwise_the_same(tmp_path: Path, stop: signal.Signals) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert here("train", recipe(whole, training__max_steps=16, lora={"dropout": 0.1})).returncode == 0
    path = recipe(cut, training__max_steps=16, lora={"dropout": 0.1})
    at = random.Random(stop.name).randint(2, 12)
    process = subprocess.Popen(
        [*HEADGATE, "train", str(path)],
        env=ENV,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = list(cut.glob("runs/*/*/metrics.jsonl"))  # not below: checkpoints come and go there
        if found and len(found[0].read_text().splitlines()) >= at:
            break
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)
    process.send_signal(stop)
    process.wait(timeout=60)
    assert process.returncode == (-9 if stop is signal.SIGKILL else 130)
    assert not list(cut.rglob("result.json"))
    again = here("train", path, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    one, two = (
        load_file(run_directory(f) / "checkpoint" / "adapter_model.safetensors") for f in (whole, cut)
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    steps = [
        json.loads(line)["step"]
        for line in (run_directory(cut) / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert steps == list(range(1, 17)), "each step is logged once, before and after the kill"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": {"source": "gsm8k", "path": "no/such.jsonl"}}, "no/such.jsonl"),
        ({"model__name_or_path": "random:lama"}, "did you mean 'llama'"),
        ({"model__name_or_path": "/no/such/model"}, "does not exist"),
        ({"lora__target_modules": ["q_projj"]}, "did you mean 'q_proj'"),
        ({"data__train": {"source": "wordmathh"}}, "did you mean 'wordmath'"),
        ({"data__max_length": 16}, "prompt alone has"),
        ({"training__lerning_rate": 1}, "did you mean 'learning_rate'"),
    ],
)
def test_mistakes_end_early_with_a_message_and_no_traceback(
    tmp_path: Path, changes: dict, message: str
) -> None:
    done = here("train", recipe(tmp_path, **changes))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing is written before the input is known to be good"


def test_bad_rows_name_file_and_line(tmp_path: Path) -> None:
    for content, message in (
        ("", "empty"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": "b"}\n', ":2"),
        ("{oops\n", ":1"),
    ):
        data = tmp_path / "data.jsonl"
        data.write_text(content)
        done = here(
            "train",
            recipe(tmp_path, data__train={"source": "gsm8k", "path": str(data)}, data__validation=None),
        )
        assert done.returncode == 2 and "data.jsonl" in done.stderr and message in done.stderr, done.stderr


def test_context_shorter_than_max_length_is_adjusted_and_said(tmp_path: Path) -> None:
    done = here("train", recipe(tmp_path, data__max_length=4096, training__max_steps=1))
    assert done.returncode == 0 and "exceeds the model's context of 512" in done.stderr


def test_tensorboard_when_asked(tmp_path: Path) -> None:
    """The same names go to TensorBoard, in a folder that outlives the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (
        here("train", recipe(tmp_path, report_to=["jsonl", "tensorboard"], training__max_steps=3)).returncode
        == 0
    )
    run = run_directory(tmp_path)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"train/loss", "train/padding_fraction", "train/tokens_per_second", "eval/loss"} <= set(
        events.Tags()["scalars"]
    )
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert sum(first["packed_sequence_length_histogram"].values()) == 40


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    assert here("train", path).returncode == 0
    run = run_directory(tmp_path)
    (run / "result.json").unlink()
    changed = yaml.safe_load((run / "recipe.yaml").read_text())
    changed["seed"] = 7
    (run / "recipe.yaml").write_text(yaml.safe_dump(changed))
    done = here("train", path)
    assert done.returncode == 1 and "holds a run of another recipe" in done.stderr


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the save fails, the checkpoint before it still resumes."""
    path = recipe(tmp_path, training__max_steps=12)
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *HEADGATE, "train", str(path)],
        env=ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert limited.returncode != 0
    assert "could not be written" in limited.stderr, limited.stderr
    run = run_directory(tmp_path)
    assert not (run / "result.json").exists()
    done = here("train", path)
    assert done.returncode == 0, done.stderr


def test_validate_schema_and_env_load_no_model(tmp_path: Path) -> None:
    done = here("validate", recipe(tmp_path))
    assert done.returncode == 0 and done.stdout.rstrip().endswith("valid") and "memory" in done.stdout
    assert "torch" in here("env").stdout
    schema = json.loads(here("schema").stdout)
    assert set(schema["properties"]["methods"]["properties"]) >= {
        "layer_routing",
        "schema_bank",
        "ewc",
        "backward_gate",
        "lora_experts",
    }


def test_evaluating_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    assert here("train", recipe(tmp_path)).returncode == 0
    run = run_directory(tmp_path)
    (run / "result.json").unlink()
    done = here("eval", run, "--task", "perplexity")
    assert done.returncode == 1 and "--allow-partial" in done.stderr


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "said"), [("stories260K", "truncated to 512"), ("babyllama-char361", "truncated to 256")]
)
def test_gsm8k_on_a_real_model(tmp_path: Path, shared: Path, name: str, said: str) -> None:
    """The loss falls; what a short context cuts off is counted and said."""
    done = here(
        "train",
        ROOT / "recipes/gsm8k/lora.yaml",
        *("--set", f"model.name_or_path={shared / 'models' / name}"),
        *("--set", f"data.train.path={shared / 'data/gsm8k/train.jsonl'}"),
        *(
            "--set",
            "data.train.limit=300",
            "--set",
            "data.validation.limit=20",
            "--set",
            "evaluation.0.limit=20",
        ),
        *(
            "--set",
            "training.max_steps=12",
            "--set",
            "training.learning_rate=1e-2",
            "--set",
            f"output_dir={tmp_path}",
        ),
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    losses = [
        row["eval_loss"] for row in map(json.loads, metrics.read_text().splitlines()) if "eval_loss" in row
    ]
    assert losses[-1] < losses[0] - 0.05


def test_a_run_of_no_steps_is_evaluated_with_its_methods(tmp_path: Path) -> None:
    """Half of the blocks closed from the start: the loss is not that of the whole model."""
    losses = []
    for name, methods in (
        ("plain", {}),
        ("truncated", {"layer_routing": {"policy": "truncate", "target_utilization": 0.5}}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        done = here("train", recipe(folder, training__max_steps=0, methods=methods))
        assert done.returncode == 0, done.stderr
        result = json.loads((run_directory(folder) / "result.json").read_text())
        losses.append(result["evaluation"]["perplexity_wordmath"]["loss"])
    assert losses[0] != losses[1]
