"""eval, generate and export through the command line: results another lab could check, adapters that serve elsewhere."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.cli.test_cli import ENV, here, recipe, run_directory

PLAIN = """
import sys
sys.path.append({packages!r})
import torch, transformers
assert not any(name.split('.')[0] == 'headgate' for name in sys.modules)
try:
    import headgate
    raise SystemExit('headgate is importable: this proves nothing')
except ImportError:
    pass
{load}
ids = torch.arange(2 * 20).reshape(2, 20) * 13 % 500 + 3
torch.save(model.eval()(input_ids=ids).logits.detach(), {out!r})
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base model that lies in a folder, as a hub model would."""
    from headgate.models.load import load_model

    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = load_model("random:llama", device="cpu")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    done = here(
        "train",
        recipe(
            folder,
            model={"name_or_path": str(folder / "base"), "revision": None},
            training__learning_rate=0.01,
            training__max_steps=6,
            lora={"r": 4, "dropout": 0.0},
            evaluation=[],
        ),
    )
    assert done.returncode == 0, done.stderr
    return run_directory(folder)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bank: what an export leaves behind."""
    folder = tmp_path_factory.mktemp("routed")
    done = here(
        "train",
        recipe(
            folder,
            methods={"schema_bank": {}},
            evaluation=[],
            training__learning_rate=0.01,
            training__max_steps=10,
        ),
    )
    assert done.returncode == 0, done.stderr
    return run_directory(folder)


def elsewhere(load: str, tmp_path: Path) -> torch.Tensor:
    """Logits from a process that can import transformers and PEFT, and cannot import Headgate."""
    out = tmp_path / "logits.pt"
    script = PLAIN.format(packages=sysconfig.get_paths()["purelib"], load=load, out=str(out))
    environment = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@torch.no_grad()
def live_logits(run: Path, *, attach: bool = True) -> torch.Tensor:
    import headgate as hg

    model, _ = hg.load(run, device="cpu", attach=attach)
    return model(input_ids=torch.arange(2 * 20).reshape(2, 20) * 13 % 500 + 3).logits


def test_adapter_serves_without_headgate(trained: Path, tmp_path: Path) -> None:
    done = here("export", trained, "--to", "peft", "--output", tmp_path / "adapter", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    base = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    logits = elsewhere(
        f"import peft\nmodel = transformers.AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = peft.PeftModel.from_pretrained(model, {str(tmp_path / 'adapter')!r})\n"
        f"transformers.AutoTokenizer.from_pretrained({str(tmp_path / 'adapter')!r})",
        tmp_path,
    )
    assert torch.equal(logits, live_logits(trained))
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert names and all(re.fullmatch(r".*\.lora_[AB]\.weight", name) for name in names)
    readme = (tmp_path / "adapter/README.md").read_text()
    for word in (
        "license: mit",
        "base_model:",
        "revision",
        "## Data",
        "## Versions",
        "## Recipe",
        "library_name: peft",
    ):
        assert word in readme, word


def test_merged_weights_serve_without_headgate_or_peft(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    done = here("export", trained, "--to", "merged", "--output", folder, "--max-shard-size", "300KB")
    assert done.returncode == 0, done.stderr
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and (folder / "model.safetensors.index.json").exists()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "headgate_export.json",
    ):
        assert (folder / name).exists(), name
    logits = elsewhere(
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert not any('lora' in name for name in model.state_dict())",
        tmp_path,
    )
    torch.testing.assert_close(logits, live_logits(trained), atol=1e-4, rtol=1e-4)


def test_merged_in_half_precision(trained: Path, tmp_path: Path) -> None:
    done = here("export", trained, "--to", "merged", "--output", tmp_path / "half", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_what_an_export_leaves_behind_is_said(routed: Path, tmp_path: Path) -> None:
    done = here("export", routed, "--to", "peft", "--output", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert "schema_bank are not part of this export" in done.stderr
    assert 'load the base with dtype="float32"' in (tmp_path / "adapter/README.md").read_text()
    record = json.loads((tmp_path / "adapter/headgate_export.json").read_text())
    assert record["routed_difference"] > 0 and record["difference"] < 1e-5
    assert record["methods"] == ["schema_bank"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguf"), "choose one of transformers, peft, merged, pruned, experts"),
        (("--to", "experts"), "experts that can be exported"),
        (("--to", "merged", "--dtype", "int3"), "choose float32, bfloat16 or float16"),
        (("--to", "merged", "--max-shard-size", "lots"), "max-shard-size"),
        (("--to", "peft", "--dtype", "float16"), "--dtype belongs to"),
        (("--to", "merged", "--merge"), "--merge belongs to"),
        (("--to", "pruned"), "routes none"),
    ],
)
def test_exports_that_cannot_be(
    trained: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = here("export", trained, "--output", tmp_path / "out", *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "out").exists(), "nothing half-made is left"


def test_a_folder_in_use_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = here("export", trained, "--to", "peft", "--output", tmp_path)
    assert done.returncode == 1 and "not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_corrupted_merge_is_not_passed_off(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headgate.experiments import export as module

    whole = module.save_merged

    def spoiled(model, *arguments):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.5)
        whole(model, *arguments)

    monkeypatch.setattr(module, "save_merged", spoiled)
    done = here("export", trained, "--to", "merged", "--output", tmp_path / "out")
    assert done.returncode == 1 and "not usable" in done.stderr and not (tmp_path / "out").exists()


def test_unfinished_runs_are_refused(trained: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "result.json").unlink()
    for verb in (
        ("export", run, "--to", "peft"),
        ("eval", run, "--task", "perplexity"),
        ("generate", run, "--prompt", "a"),
    ):
        done = here(*verb)
        assert done.returncode == 1 and "--allow-partial" in done.stderr
        assert "no whole checkpoint" in here(*verb, "--allow-partial").stderr


def test_an_adapter_of_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    import shutil

    adapter = trained / "checkpoint"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    evaluate = ("--task", "perplexity", "--limit", 4, "--output", tmp_path / "p")
    assert here("eval", base, "--adapter", adapter, *evaluate).returncode == 0
    shutil.copytree(base, tmp_path / "other-base")
    done = here("eval", tmp_path / "other-base", "--adapter", adapter, *evaluate)
    assert done.returncode == 2 and "was made for base model" in done.stderr
    done = here("eval", "random:gpt2", "--adapter", adapter, *evaluate)
    assert done.returncode == 2 and "error: adapter" in done.stderr, "by shape, where no name is recorded"
    done = here("eval", trained, "--adapter", adapter, *evaluate)
    assert done.returncode == 2 and "brings its own adapter" in done.stderr
    assert "does not exist" in here("eval", base, "--adapter", tmp_path / "none", *evaluate).stderr


def test_paired_evaluation(trained: Path, tmp_path: Path) -> None:
    base = json.loads((trained / "checkpoint/adapter_config.json").read_text())["base_model_name_or_path"]
    done = here(
        "eval", base, trained, "--paired", "--task", "exact_match,perplexity", "--limit", 12, "--max-new-tokens", 6,
        "--output", tmp_path / "p", "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exact_match_wordmath"]["items"] == 12 and "flips" in report["exact_match_wordmath"]
    assert report["perplexity_wordmath"]["difference"] != 0
    assert "McNemar" in done.stdout and "bootstrap" in done.stdout
    assert len(list((tmp_path / "p").glob("*/*.jsonl"))) == 4
    for targets, flags in (((base,), ("--paired",)), ((base, trained), ())):
        assert here("eval", *targets, *flags, "--task", "perplexity").returncode == 2


def test_routing_can_be_removed_for_an_evaluation(routed: Path, tmp_path: Path) -> None:
    losses = {}
    for how in ("on", "removed"):
        done = here(
            "eval", routed, "--task", "perplexity", "--limit", 8, "--routing", how, "--output", tmp_path,
            "--json", tmp_path / f"{how}.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses[how] = json.loads((tmp_path / f"{how}.json").read_text())["perplexity_wordmath"]["loss"]
        assert (tmp_path / f"perplexity_wordmath.{how}.jsonl").exists()
    assert losses["on"] != losses["removed"]
    assert here("eval", "random:llama", "--task", "perplexity", "--routing", "on").returncode == 2


@pytest.mark.shared
def test_gsm8k_does_not_depend_on_the_batch(shared: Path, tmp_path: Path) -> None:
    """A sample here; the whole test set is compared by the slow test below."""
    assert gsm8k(shared, tmp_path, "--limit", 24, "--sample-seed", 5) == 24


@pytest.mark.shared
@pytest.mark.slow
def test_the_whole_of_gsm8k_does_not_depend_on_the_batch(shared: Path, tmp_path: Path) -> None:
    assert gsm8k(shared, tmp_path) == 1319


def gsm8k(shared: Path, tmp_path: Path, *extra: object) -> int:
    files = []
    for size in (1, 32):
        done = here(
            "eval", shared / "models/stories260K", "--task", "gsm8k", "--path", shared / "data/gsm8k", "--device", "cpu",
            "--max-new-tokens", 64, "--batch-size", size, "--output", tmp_path / str(size), *extra,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "strict" in done.stdout and "math_verify" in done.stdout and "Timeout" not in done.stderr
        files.append((tmp_path / str(size) / "gsm8k_gsm8k.jsonl").read_text())
    assert files[0] == files[1]
    return len(files[0].splitlines())


@pytest.mark.shared
def test_few_shot_examples_come_from_the_training_split(shared: Path, tmp_path: Path) -> None:
    data = ("--path", shared / "data/gsm8k", "--limit", 2, "--max-new-tokens", 4, "--output", tmp_path)
    done = here("eval", "random:llama", "--task", "gsm8k", "--few-shot", 5, *data)
    assert done.returncode == 0, done.stderr
    assert "prompts lost their beginning" in done.stdout
    alone = tmp_path / "only.jsonl"
    alone.write_text((shared / "data/gsm8k/test.jsonl").read_text())
    done = here("eval", "random:llama", "--task", "gsm8k", "--few-shot", 2, *data, "--path", alone)
    assert done.returncode == 2 and "training split" in done.stderr


@pytest.mark.shared
def test_code_needs_permission_and_reports_how_programs_ended(shared: Path, tmp_path: Path) -> None:
    arguments = (
        "eval", "random:llama", "--task", "mbpp", "--path", shared / "data/mbpp/mbpp.jsonl", "--limit", 4,
        "--max-new-tokens", 16, "--output", tmp_path, "--json", tmp_path / "r.json",
    )  # fmt: skip
    refused = here(*arguments)
    assert refused.returncode == 2 and "--allow-code-execution" in refused.stderr
    assert not (tmp_path / "mbpp.jsonl").exists()
    done = here(*arguments, "--allow-code-execution", "--samples-per-item", 3, "--sample", "--k", 1, "--k", 2)
    assert done.returncode == 0, done.stderr
    assert "sandbox: " in done.stdout
    found = json.loads((tmp_path / "r.json").read_text())["mbpp"]
    assert sum(found["outcomes"].values()) == 12 and {"pass@1", "pass@2"} <= found.keys()
    items = [json.loads(line) for line in (tmp_path / "mbpp.jsonl").read_text().splitlines()]
    assert len(items) == 4 and all(len(item["outcomes"]) == 3 for item in items)
    assert "would all be equal" in here(*arguments, "--allow-code-execution", "--samples-per-item", 3).stderr
    assert "samples_per_item of at least 5" in here(*arguments, "--allow-code-execution", "--k", 5).stderr


def test_unknown_tasks_are_named() -> None:
    done = here("eval", "random:llama", "--task", "gsm8kk")
    assert done.returncode == 2 and "did you mean 'gsm8k" in done.stderr
    assert "does not exist" in here("eval", "random:llama", "--task", "no/such/task.yaml").stderr


def test_perplexity_windows_at_several_lengths(tmp_path: Path) -> None:
    text = tmp_path / "test.txt"
    text.write_text("Tom has three apples and Mia has two. " * 40)
    done = here(
        "eval", "random:llama", "--task", "perplexity", "--source", "text", "--path", text, "--windows", "sliding",
        "--length", 16, "--length", 64, "--output", tmp_path, "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "r.json").read_text()).values()
    assert found["16"]["tokens"] == found["64"]["tokens"] > 0 and "64 tokens:" in done.stdout


def test_generating(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--max-new-tokens", 8, "--device", "cpu")
    plain = here("generate", trained, "--prompt", "Tom has", "--prompt", "Six", *options)
    streamed = here("generate", trained, "--prompt", "Tom has", "--prompt", "Six", "--stream", *options)
    assert plain.returncode == streamed.returncode == 0, plain.stderr + streamed.stderr
    assert plain.stdout.split() == streamed.stdout.split(), "streaming shows the same tokens"
    sampled = [
        here("generate", trained, "--prompt", "Tom", "--sample", "--seed", s, *options).stdout
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tom has\n\nSix\n"))
    spoken = here("generate", trained, "--interactive", *options)
    assert spoken.returncode == 0 and spoken.stdout.replace(">", " ").split() == plain.stdout.split()
    assert here("generate", trained).returncode == 2
    assert (
        "must be above 0" in here("generate", trained, "--prompt", "a", "--sample", "--temperature", 0).stderr
    )
