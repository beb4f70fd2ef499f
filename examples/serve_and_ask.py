"""`transformers serve` on an exported folder, asked by the `openai` client: plain, streamed, several at once.

    headgate export RUN --to transformers --output served
    pip install openai 'transformers[serving]'
    python examples/serve_and_ask.py served "Tom has three apples." "Six friends"

Prints every answer and says whether it is what `generate` gives. Headgate is not imported: the server and the comparison run
on the modeling file in the folder.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

SERVER = ("-m", "transformers.cli.transformers", "serve")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(client: OpenAI, server: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Until the server answers. Raises RuntimeError where it ended, TimeoutError where it never came up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            socket.create_connection((client.base_url.host, client.base_url.port or 80), 1).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"no answer in {seconds:.0f} s")


def ask(client: OpenAI, folder: str, text: str, tokens: int, *, stream: bool = False) -> str:
    options: dict[str, Any] = {
        "model": folder,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    if not stream:
        return client.chat.completions.create(**options).choices[0].message.content or ""
    chunks = client.chat.completions.create(**options, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def expected(folder: str, texts: list[str], tokens: int) -> list[str]:
    """What `generate` itself gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answers = []
    for text in texts:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        answers.append(tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def whole(text: str) -> str:
    """Without a character that the token limit cut through: a stream waits for its other bytes."""
    return text.rstrip("\ufffd")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args()
    folder, port = str(Path(given.folder).resolve()), free_port()
    if getattr(AutoTokenizer.from_pretrained(folder, trust_remote_code=True), "chat_template", None) is None:
        print(
            "the tokenizer has no chat template, which chat requests need: save one in the folder",
            file=sys.stderr,
        )
        return 2
    place = ("--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port))
    server = subprocess.Popen([sys.executable, *SERVER, folder, *place])
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        wait_for(client, server)
        begin = time.perf_counter()
        plain = [ask(client, folder, text, given.tokens) for text in given.texts]
        seconds = time.perf_counter() - begin
        streamed = [ask(client, folder, text, given.tokens, stream=True) for text in given.texts]
        with ThreadPoolExecutor(len(given.texts)) as pool:
            together = list(pool.map(lambda text: ask(client, folder, text, given.tokens), given.texts))
    finally:
        server.terminate()
        server.wait(30)
    wanted = expected(folder, given.texts, given.tokens)
    ways = {"plain": plain, "streamed": streamed, "together": together}
    same = True
    for place, (text, want) in enumerate(zip(given.texts, wanted, strict=True)):
        print(f"{text!r} -> {want!r}")
        for way, answers in ways.items():
            if whole(answers[place]) != whole(want):
                print(f"  {way}: {answers[place]!r}")
                same = False
    print(f"plain, streamed, together and generate are {'the same' if same else 'NOT the same'}")
    print(f"{len(plain) * given.tokens / seconds:.1f} tokens/s at most {given.tokens} tokens an answer")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
