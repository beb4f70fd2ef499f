"""Where models are: the package's own, folders of this machine, and names that only the hub can know. Imports no torch."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from headgate.errors import ModelError

EMBEDDED = Path(__file__).parent / "embedded"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_local(name: str) -> bool:
    """Whether a name can only mean a folder of this machine: the hub's are ``owner/name``, and ``runs`` is where runs lie."""
    return name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1


def check_place(name: str) -> None:
    """What can be known of a model's name without its weights. Raises ModelError for a folder that holds none, or is not there."""
    if name == "embedded" or name.startswith("random:"):
        return
    folder = Path(name)
    if not folder.exists():
        if is_local(name):
            raise ModelError(f"model folder {name!r} does not exist: check model.name_or_path")
        if "/" not in name and difflib.get_close_matches(name, ["embedded"], cutoff=0.8):
            raise ModelError(f"model.name_or_path={name!r}: did you mean 'embedded'?")
        return
    config = folder / "config.json"
    if not config.exists():
        raise ModelError(f"model folder {name!r} has no config.json: it is not a saved transformers model")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model folder {name!r}: config.json is damaged ({error}): copy it again") from error
    if not any((folder / file).exists() for file in WEIGHT_FILES):
        raise ModelError(f"model folder {name!r} has no weights (looked for {', '.join(WEIGHT_FILES)})")
