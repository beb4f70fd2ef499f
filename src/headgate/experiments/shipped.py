"""The recipes that come with the package: what there is, and where one lies."""

from __future__ import annotations

import difflib
import glob
from pathlib import Path

import headgate
from headgate.errors import ConfigError

FOLDER = Path(headgate.__file__).parent / "recipes"


def shipped_names() -> list[str]:
    """Their names, ``lora_experts/quickstart``; those that only others build on (``_x``) are left out."""
    found = (Path(path).relative_to(FOLDER) for path in glob.glob(f"{FOLDER}/**/*.yaml", recursive=True))
    return sorted(
        str(path.with_suffix(""))
        for path in found
        if not path.name.startswith("_") and "accelerate" not in path.parts  # a launcher's own files
    )


def shipped(name: str) -> Path | None:
    """The recipe of that name, with or without ``recipes/`` before and ``.yaml`` after it; None where there is none."""
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    path = FOLDER / f"{short}.yaml"
    return path if path.is_file() and FOLDER.resolve() in path.resolve().parents else None


def find_shipped(name: str) -> Path:
    """``shipped``, or a ConfigError that says what is near."""
    path = shipped(name)
    if path is None:
        close = difflib.get_close_matches(name, shipped_names(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "headgate recipes lists them"
        raise ConfigError(f"there is no recipe {name!r} in the package: {hint}")
    return path


def opening(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#") or line.startswith("#   "):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).split(". ")[0].split("? ")[0].rstrip(".:")
