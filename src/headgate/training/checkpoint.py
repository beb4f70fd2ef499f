"""Checkpoints: the adapter as plain PEFT, the methods' state beside it, and a manifest written last.

A folder without a manifest, or whose files do not match it, is never resumed from and never loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import headgate
from headgate.errors import CheckpointError, DamagedFile
from headgate.files import digest, read_json, sync_tree, write_json
from headgate.methods.compose import MethodStack
from headgate.methods.registry import method_class
from headgate.training.folders import checkpoints as checkpoints

FORMAT_VERSION = 2
SEALED_SINCE = 2
"""From this format on every saved folder has a manifest; before, only checkpoints had one."""
STATE_FILE = "headgate.safetensors"
STRUCTURE_FILE = "headgate.json"
MANIFEST = "manifest.json"
CARD = "README.md"
"""A model card is the user's to edit: the manifest leaves it out."""
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
Description = dict[str, Any]
"""``headgate.json``: how the methods of a checkpoint are built, where training stood, what it had counted."""


def save_methods(folder: Path, methods: MethodStack, extra: Mapping[str, object]) -> None:
    """Parameters and buffers of all methods, and the structure to build them from."""
    state = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in methods.state_dict().items()
    }
    save_file(state, folder / STATE_FILE, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSION,
        "headgate_version": headgate.__version__,
        "methods": methods.structure(),
        **extra,
    }
    write_json(folder / STRUCTURE_FILE, description)


def read_description(folder: Path) -> Description:
    """``headgate.json``. Raises CheckpointError when it is absent, unreadable, not what was saved, or of a later format."""
    path = folder / STRUCTURE_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} has no {STRUCTURE_FILE}: it was not saved by Headgate")
    description = read_json(path)
    if not isinstance(description.get("format_version"), int) or "methods" not in description:
        raise CheckpointError(f"{path} is damaged (it names no format or no methods): use another checkpoint")
    if description["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {description['format_version']}, this Headgate reads up to {FORMAT_VERSION}: upgrade headgate"
        )
    wrong = damage(folder)
    if wrong is not None and ((folder / MANIFEST).exists() or description["format_version"] >= SEALED_SINCE):
        raise CheckpointError(f"{folder} {wrong}: use another checkpoint, or run its recipe again")
    return description


def load_method_state(folder: Path, methods: MethodStack) -> None:
    """Strict load into methods that have the saved structure; nothing missing, nothing left over."""
    path = folder / STATE_FILE
    try:
        state: dict[str, Tensor] = load_file(path) if path.exists() else {}
    except Exception as error:
        raise CheckpointError(f"{path} is corrupted ({error}): use another checkpoint") from None
    try:
        methods.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the methods of this run: {error}") from None


def restore_methods(folder: Path, methods: MethodStack) -> Description:
    """Bring attached methods to the saved structure and state, for a resume. Returns the description."""
    description = read_description(folder)
    with _structure_fits(str(folder)):
        methods.restore(description["methods"], str(folder))
    load_method_state(folder, methods)
    return description


def build_methods(description: Description) -> MethodStack:
    """Methods with the saved structure, not attached yet; what they draw at inference, they draw as in the run."""
    built = []
    for name, structure in description["methods"].items():
        with _structure_fits(f"the saved {name}"):
            built.append(method_class(name).from_structure(structure))
    methods = MethodStack(built)
    methods.set_seed(int(description.get("seed", 0)))
    return methods


@contextmanager
def _structure_fits(saved: str) -> Iterator[None]:
    """What another version of a method wrote lacks what this one reads: said as that, and not as a missing key."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"{saved} was written by another version of Headgate (its structure has no {error}): load it with that version, or "
            "run its recipe again"
        ) from error


def seal(folder: Path) -> None:
    """Bring every file to the disk, then write the manifest: from now on the folder is complete."""
    sync_tree(folder)
    files = {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, CARD)
    }
    write_json(folder / MANIFEST, {"files": files})


def damage(folder: Path) -> str | None:
    """What is wrong with a saved folder, or None if it is complete, unharmed and finite."""
    if not (folder / MANIFEST).exists():
        return "is incomplete (no manifest: the save was cut short)"
    try:
        files = read_json(folder / MANIFEST).get("files")
    except DamagedFile:
        files = None
    if not isinstance(files, dict) or not files:
        return "is corrupted: its manifest is torn"
    for name, written in files.items():
        if not (folder / name).is_file():
            return f"has lost {name}"
        if digest(folder / name) != written:
            return f"is corrupted: {name} has changed since it was saved"
    for name in WEIGHTS:
        if name in files and not _is_finite(folder / name):
            return f"holds weights in {name} that are not finite"
    return None


def _is_finite(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in file.keys())  # noqa: SIM118


def last_valid(output_dir: str | Path, tell: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that is whole and finite; others are named through ``tell`` and passed over."""
    for folder in checkpoints(output_dir):
        wrong = damage(folder)
        if wrong is None:
            return folder
        if tell is not None:
            tell(f"{folder} {wrong}: not resumed from")
    return None


def require_valid(folder: str | Path) -> Path:
    """The folder, if it is a whole checkpoint; CheckpointError naming what is wrong otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist")
    wrong = damage(folder)
    if wrong is not None:
        raise CheckpointError(f"checkpoint {folder} {wrong}: resume from another one")
    return folder


def rotate(output_dir: str | Path, keep: int | None, best: str | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one, and whatever a kill left half-written."""
    folders = checkpoints(output_dir)
    whole = [folder for folder in folders if (folder / MANIFEST).exists()]
    stale = [folder for folder in folders if folder not in whole]
    if keep is not None:
        kept = set(whole[: max(1, keep)]) | ({Path(best)} if best else set())
        kept_names = {folder.name for folder in kept}
        stale += [folder for folder in whole if folder.name not in kept_names]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)


def deterministic(on: bool) -> None:
    """Deterministic kernels where torch has them; an operation without one only warns."""
    torch.use_deterministic_algorithms(on, warn_only=True)
