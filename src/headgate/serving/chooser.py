"""Which adapter answers a text: `choose(text)` gives its name. Needs Python alone.

    python chooser.py "Tom has three apples."
    vllm serve BASE --enable-lora --lora-modules $(python chooser.py --lora-modules)

Naive Bayes over hashed words and pairs of words, counted on the training prompts of every skill; router.safetensors
holds log P(bucket | skill), skills.json who serves which skill. Every digit counts as 0.
"""

import array
import itertools
import json
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
Loaded = tuple[list[dict[str, str]], Sequence[Sequence[float]]]
WORD = re.compile(r"\w+|[^\w\s]")


def buckets(text: str, size: int) -> list[int]:
    """The hashed words and pairs of neighbours of a text, as places below ``size``."""
    words = [re.sub(r"\d", "0", word) for word in WORD.findall(text.lower())]
    pairs = [f"{one} {other}" for one, other in itertools.pairwise(words)]
    return [zlib.crc32(part.encode()) % size for part in words + pairs]


def load(folder: Path = HERE) -> Loaded:
    """(skills, rows of log P): one row of floats a skill, in the order of skills.json."""
    skills = json.loads((folder / "skills.json").read_text())["skills"]
    content = (folder / "router.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entry = json.loads(content[8 : 8 + length])["log_probability"]
    begin, end = entry["data_offsets"]
    values = array.array("f")
    values.frombytes(content[8 + length + begin : 8 + length + end])
    if sys.byteorder == "big":
        values.byteswap()
    width = entry["shape"][1]
    return skills, [values[i * width : (i + 1) * width] for i in range(len(skills))]


def choose(text: str, loaded: "Loaded | None" = None) -> str:
    """The adapter's name: that of the skill which makes the text most likely."""
    skills, rows = loaded or load()
    places = buckets(text, len(rows[0]))
    scores = [sum(row[place] for place in places) for row in rows]
    adapter: str = skills[scores.index(max(scores))]["adapter"]
    return adapter


def lora_modules(folder: Path = HERE) -> list[str]:
    """What vLLM's --lora-modules takes: name=path for every adapter."""
    names = json.loads((folder / "skills.json").read_text())["adapters"]
    return [f"{name}={folder / name}" for name in names]


if __name__ == "__main__":
    print(" ".join(lora_modules()) if sys.argv[1:] == ["--lora-modules"] else choose(" ".join(sys.argv[1:])))
