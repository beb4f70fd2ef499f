"""Preparing data against ``datasets.map`` alone: rows a second, the second time, peak memory, and a 2x2 comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from headgate.data import wordmath
from headgate.experiments.benchmarks.frame import Check, Report, Say, at_least, at_most, not_measured
from headgate.experiments.records import Figures

TOKENS = 230
_PROCESSOR = """
import resource
def processor():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
"""
_HEADGATE = (
    _PROCESSOR
    + """
import json, sys, time
from transformers import AutoTokenizer
from headgate.models.load import EMBEDDED
import headgate.data.preparation
start, used = time.perf_counter(), processor()
from headgate.data import DataConfig, SourceConfig, load_data, prepare
config = DataConfig(train=SourceConfig(source="prompt_completion", path=sys.argv[1]), validation=None, max_length=1024)
rows, _ = load_data(config)
prepared = prepare(rows, AutoTokenizer.from_pretrained(EMBEDDED), config)
prepared.dataset[len(prepared.dataset) - 1]
print(json.dumps([time.perf_counter() - start, processor() - used, prepared.report.rows, prepared.report.tokens]))
"""
)
_DATASETS = (
    _PROCESSOR
    + """
import json, sys, time
import datasets
from transformers import AutoTokenizer
from headgate.models.load import EMBEDDED
datasets.disable_progress_bars()
start, used = time.perf_counter(), processor()
tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
def encode(batch):
    out = tokenizer([p + c for p, c in zip(batch["prompt"], batch["completion"])], truncation=True, max_length=1024)
    prompts = tokenizer(batch["prompt"])["input_ids"]
    out["labels"] = [[-100] * len(p) + ids[len(p):] for p, ids in zip(prompts, out["input_ids"])]
    return out
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
made = rows.map(encode, batched=True, num_proc=int(sys.argv[2]), remove_columns=rows.column_names)
made[len(made) - 1]
print(json.dumps([time.perf_counter() - start, processor() - used, len(made), sum(map(len, made[:1000]["input_ids"])) * len(made) // 1000]))
"""
)


def write_problems(path: Path, rows: int) -> None:
    """``rows`` prompts and worked answers of about 230 tokens of the embedded tokenizer, all different."""
    problems = [f"{row['question']} {row['answer']}" for row in wordmath.generate("train", 2000)]
    with path.open("w") as file:
        for number in range(rows):
            picked = [problems[(number * 7 + turn * 131) % len(problems)] for turn in range(3)]
            file.write(
                json.dumps({"prompt": f"{number}. {picked[0]}\n", "completion": " ".join(picked[1:])}) + "\n"
            )


def measured(code: str, arguments: list[str], environment: dict[str, str]) -> Figures:
    """Seconds that the child measured, and the peak of what it and its processes hold together (MiB, proportional)."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    peak = 0.0
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            held = [member.memory_full_info() for member in family]
            peak = max(peak, sum(getattr(m, "pss", m.rss) for m in held) / 2**20)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            pass
        time.sleep(0.2)
    output = child.stdout.read() if child.stdout is not None else ""
    if child.returncode:
        raise RuntimeError(f"the benchmark's process ended with code {child.returncode}")
    seconds, processor, rows, tokens = json.loads(output.strip().splitlines()[-1])
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "rows": rows,
        "tokens": tokens,
        "rows_per_second": rows / seconds,
        "peak_mib": peak,
    }


def run(*, quick: bool, say: Say) -> Report:
    """1e5 rows (1e4 with ``--quick``), and 1e6 where ``HEADGATE_BENCH_ROWS=1000000`` asks for it."""
    report = Report("data")
    sizes = [10_000 if quick else 100_000]
    if int(os.environ.get("HEADGATE_BENCH_ROWS", "0")) > sizes[0]:
        sizes.append(int(os.environ["HEADGATE_BENCH_ROWS"]))
    processes = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_problems(file, size)
            arms = [("headgate", _HEADGATE), ("datasets.map", _DATASETS)] if size == sizes[0] else [("headgate", _HEADGATE)]  # fmt: skip
            for name, code in arms:
                environment = {
                    "HEADGATE_CACHE": str(Path(folder) / "headgate"),
                    "HF_DATASETS_CACHE": str(Path(folder) / "hf"),
                    "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONWARNINGS": "ignore",
                }
                for turn in ("first", "second"):
                    arm = measured(code, [str(file), processes], environment)
                    report.arms[f"{name}, {size} rows, {turn} time"] = arm
                    say(f"{name}, {size} rows, {turn} time: {arm['seconds']:.1f} s, {arm['processor_seconds']:.1f} processor seconds, {arm['rows_per_second']:.0f} rows/s, {arm['peak_mib']:.0f} MiB")  # fmt: skip
    first = report.arms[f"headgate, {sizes[0]} rows, first time"]
    second = report.arms[f"headgate, {sizes[0]} rows, second time"]
    peer = report.arms[f"datasets.map, {sizes[0]} rows, first time"]
    report.ratios = {"headgate/datasets.map, first time": first["seconds"] / peer["seconds"]}
    report.ratios["the same in processor time"] = first["processor_seconds"] / peer["processor_seconds"]
    scale = sizes[0] / 100_000
    report.checks = [
        at_most(f"seconds for {sizes[0]} rows, first time", first["seconds"], 40 * scale + 5 * quick),
        at_most(f"seconds for {sizes[0]} rows, second time", second["seconds"], 2),
        at_least("tokens a row", first["tokens"] / first["rows"], TOKENS * 0.9),
    ]
    if len(sizes) > 1:
        million = report.arms[f"headgate, {sizes[1]} rows, first time"]
        report.checks.append(at_most(f"MiB for {sizes[1]} rows", million["peak_mib"], 1536))
    else:
        report.checks.append(
            not_measured("MiB for 1000000 rows", "<= 1536", "set HEADGATE_BENCH_ROWS=1000000")
        )
    report.checks.append(_prepares_once())
    return report


def _prepares_once() -> Check:
    """Two arms x two seeds: how many token stores there are afterwards, of training and of validation data."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "compare.yaml"
        recipe.write_text(
            f"name: once\noutput_dir: {folder}/runs\n"
            "model: {name_or_path: 'random:llama'}\n"
            "data: {train: {source: wordmath, limit: 64}, validation: {source: wordmath, split: validation, limit: 8}}\n"
            "training: {max_steps: 2, per_device_train_batch_size: 2}\n"
            "compare: {seeds: [1, 2], arms: {a: {}, b: {training: {learning_rate: 1.0e-3}}}}\n"
        )
        environment = {**os.environ, "HEADGATE_CACHE": f"{folder}/cache"}
        command = [sys.executable, "-m", "headgate.cli.main", "compare", str(recipe)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        stores = len(list(Path(folder, "cache", "tokens").glob("*/done.json")))
        return Check("token stores of a 2x2 comparison (train, validation)", stores, "== 2", done.returncode == 0 and stores == 2)  # fmt: skip
