"""One `transformers serve` with two exported folders behind it, asked in turn by the `openai` client: a transcript and tokens/s.

    headgate export DENSE_RUN --to merged --output dense
    headgate export ROUTED_RUN --to transformers --merge --output routed
    python scripts/serve_transcript.py dense routed --json benchmarks/results/serve.cpu.json

The first prompts of wordmath's test split go to both folders over loopback, A B B A, greedy, every answer of the same length:
one by one, streamed, two at once. Every answer is held against `generate` of the same folder in this process, which is timed in the same turns: by the clock,
and by the seconds of a processor, which neighbours on a shared machine change less. Exit code 1 where an answer differs. Needs
`pip install 'headgate[serve]'`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from headgate.data.config import SourceConfig
from headgate.data.sources import load_rows
from headgate.experiments.benchmarks.frame import Check, Report, interleaved, paired_ratio, spread
from headgate.files import write_atomically

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from serve_and_ask import SERVER, free_port, wait_for, whole

ARMS = ("dense", "routed")
WAYS = ("plain", "streamed", "two at once", "generate")


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int


class Asking:
    """Asks one folder in every way, remembering answers and the processor's seconds of each.

    ``tokens``: the length of every answer, so that both folders decode as much; ``busy``: the processor's seconds of the
    server so far.
    """

    def __init__(
        self, client: OpenAI, folder: Path, prompts: list[str], tokens: int, busy: Callable[[], float]
    ) -> None:
        self.client, self.prompts, self.tokens, self.busy = client, prompts, tokens, busy
        self.folder = str(folder.resolve())
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.answers: dict[str, list[list[Answer]]] = {way: [] for way in WAYS}
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.ask = {
            "plain": self.plain,
            "streamed": self.streamed,
            "two at once": self.plain,
            "generate": self.generate,
        }

    def all_prompts(self, way: str) -> None:
        """One turn."""
        clock = time.process_time if way == "generate" else self.busy
        begin = clock()
        with ThreadPoolExecutor(2 if way == "two at once" else 1) as pool:
            self.answers[way].append(list(pool.map(self.ask[way], self.prompts)))
        self.seconds[way].append(clock() - begin)

    def _options(self, prompt: str) -> dict[str, Any]:
        same = GenerationConfig.from_pretrained(self.folder, min_new_tokens=self.tokens, do_sample=False)
        return {
            "model": self.folder,
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "extra_body": {"generation_config": same.to_json_string()},
        }

    def plain(self, prompt: str) -> Answer:
        found = self.client.completions.create(**self._options(prompt))
        assert found.usage is not None
        return Answer(str(found.choices[0].text), found.usage.completion_tokens)

    def streamed(self, prompt: str) -> Answer:
        chunks = list(self.client.completions.create(**self._options(prompt), stream=True))
        assert chunks[-1].usage is not None
        return Answer("".join(chunk.choices[0].text for chunk in chunks), chunks[-1].usage.completion_tokens)

    @torch.no_grad()
    def generate(self, prompt: str) -> Answer:
        given = self.tokenizer(prompt, return_tensors="pt")
        ids = self.model.generate(
            **given, max_new_tokens=self.tokens, min_new_tokens=self.tokens, do_sample=False
        )
        new = ids[0, given["input_ids"].shape[1] :]
        return Answer(str(self.tokenizer.decode(new, skip_special_tokens=True)), len(new))

    def wrong(self, way: str) -> int:
        """Answers of all rounds that are not what ``generate`` gave."""
        wanted = self.answers["generate"][0]
        pairs = [(a, b) for found in self.answers[way] for a, b in zip(found, wanted, strict=True)]
        return sum(whole(a.text) != whole(b.text) or a.tokens != b.tokens for a, b in pairs)


def transcript(asking: dict[str, Asking]) -> None:
    """What a user types, and what comes back: one request, a stream with the seconds of its chunks, two at once."""
    one = asking["routed"]
    print(
        f">>> client.completions.create(model='routed', prompt={one.prompts[0]!r}, max_tokens={one.tokens}, temperature=0, ...)"
    )
    print(one.plain(one.prompts[0]))
    print(">>> client.completions.create(..., stream=True)")
    begin = time.perf_counter()
    for number, chunk in enumerate(
        one.client.completions.create(**one._options(one.prompts[0]), stream=True)
    ):
        if number < 4 and chunk.choices[0].text:
            print(f"{time.perf_counter() - begin:.3f} s  {chunk.choices[0].text!r}")
    print(f"{time.perf_counter() - begin:.3f} s  the end, after {number + 1} chunks")
    print(f">>> two at once: {one.prompts[0]!r}, {one.prompts[1]!r}")
    with ThreadPoolExecutor(2) as pool:
        for answer in pool.map(one.plain, one.prompts[:2]):
            print(answer)


def measured(asking: dict[str, Asking], rounds: int) -> Report:
    """Tokens a second of every way and folder, and routed against dense within each round."""
    report = Report("serve")
    turns = {f"{name}, {way}": partial(asking[name].all_prompts, way) for way in WAYS for name in ARMS}
    seconds = interleaved(turns, rounds=rounds, warmup=1)
    for way in WAYS:
        rates, busy_rates = {}, {}
        for name in ARMS:
            one, key = asking[name], f"{name}, {way}"
            tokens = sum(answer.tokens for answer in one.answers[way][0])
            rates[name] = [tokens / value for value in seconds[key]]
            busy_rates[name] = [tokens / value for value in one.seconds[way][1:]]
            report.arms[key] = {
                **spread(seconds[key]),
                "tokens": tokens,
                "tokens_per_second": median(rates[name]),
                "tokens_per_processor_second": median(busy_rates[name]),
            }
            if way != "generate":
                wrong = one.wrong(way)
                report.checks.append(Check(f"{key}, answers unlike generate", wrong, "== 0", wrong == 0))
        report.ratios[f"{way}, routed / dense"] = paired_ratio(rates["routed"], rates["dense"])
        report.ratios[f"{way}, routed / dense, processor"] = paired_ratio(
            busy_rates["routed"], busy_rates["dense"]
        )
    return report


def table(report: Report) -> None:
    print("\n              tokens/s: dense  routed  ratio   by processor: dense  routed  ratio")
    for way in WAYS:
        dense, routed = (report.arms[f"{name}, {way}"] for name in ARMS)
        clock, busy = (report.ratios[f"{way}, routed / dense{by}"] for by in ("", ", processor"))
        print(
            f"{way:12}  {dense['tokens_per_second']:15.1f}  {routed['tokens_per_second']:6.1f}  x{clock:.2f}   "
            f"{dense['tokens_per_processor_second']:19.1f}  {routed['tokens_per_processor_second']:6.1f}  x{busy:.2f}"
        )
    wrong = sum(int(check.value or 0) for check in report.checks)
    print(f"answers that are not generate's: {wrong}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", type=Path)
    parser.add_argument("routed", type=Path)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    prompts = [row["prompt"] for row in load_rows(SourceConfig(split="test", limit=given.prompts))]
    port = free_port()
    place = ("--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port))
    server = subprocess.Popen(
        [sys.executable, *SERVER, *place], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    print("$ transformers serve --trust-remote-code --device cpu")
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        wait_for(client, server)
        process = psutil.Process(server.pid)
        asking = {
            name: Asking(client, folder, prompts, given.tokens, busy=lambda: sum(process.cpu_times()[:2]))
            for name, folder in zip(ARMS, (given.dense, given.routed), strict=True)
        }
        transcript(asking)
        report = measured(asking, given.rounds)
    finally:
        server.terminate()
        server.wait(30)
    table(report)
    if given.json is not None:
        write_atomically(given.json, json.dumps(report.as_dict(), indent=1))
    return 0 if all(check.ok for check in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
