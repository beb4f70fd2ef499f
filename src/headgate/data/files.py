"""Which files a path means: one file, a glob, a folder with splits or shards, a saved data set, a hub snapshot.

Names follow the hub's conventions: a file belongs to a split where a part of its path says so (``train.jsonl``,
``data/train-00000-of-00002.parquet``, ``validation/part.csv``); files that name no split are training data.
"""

from __future__ import annotations

import difflib
import glob
import re
from dataclasses import dataclass
from pathlib import Path

from headgate.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.*?)-(\d{5})-of-(\d{5})")
_SLICE = re.compile(r"([^\[\]]+)\[(\d*):(\d*)\]")


@dataclass(frozen=True)
class DataFiles:
    """Files to read in order, or the folder of a saved data set."""

    files: tuple[Path, ...] = ()
    saved: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file whose content matters."""
        if self.saved is None:
            return self.files
        return tuple(sorted(self.saved.glob("*.arrow")))


def kind_of(path: Path) -> str | None:
    """The format that a file's name says, compression aside; None for what is no data."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    return KINDS.get(suffixes[-1].lower()) if suffixes else None


def base_split(split: str) -> str:
    """``train`` of ``train[:1000]``."""
    return split.split("[")[0]


def split_slice(split: str) -> slice:
    """The rows that ``train[10:20]`` asks for. Raises DataError for what is no such slice."""
    if "[" not in split:
        return slice(None)
    match = _SLICE.fullmatch(split)
    if match is None:
        raise DataError(f"split '{split}': write a slice of rows as {base_split(split)}[start:stop]")
    return slice(*(int(part) if part else None for part in match.groups()[1:]))


def slices_apart(split: str, other: str) -> bool:
    """Whether both are slices of one split, and one ends where or before the other begins."""
    if base_split(split) != base_split(other) or "[" not in split or "[" not in other:
        return False
    parts = (split_slice(split), split_slice(other))
    return any(a.stop is not None and a.stop <= (b.start or 0) for a, b in (parts, parts[::-1]))


def find_files(path: str, split: str, name: str | None = None) -> DataFiles:
    """The files of ``split`` at ``path``. Raises DataError where there are none, saying what there is."""
    place = Path(path).expanduser()
    if any(letter in path for letter in "*?[") and not place.exists():
        found = sorted(Path(match) for match in glob.glob(str(place), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise DataError(f"data path '{path}' matches no file: check the pattern and where it starts from")
        return DataFiles(tuple(_readable(file) for file in files))
    if place.is_file():
        return DataFiles((_readable(place),))
    if not place.exists():
        raise DataError(
            f"data path '{path}' does not exist: give a file, a glob, a folder or a hub data set's name"
            + _near(place)
        )
    return _folder(place, split, name)


def _folder(place: Path, split: str, name: str | None) -> DataFiles:
    base = base_split(split)
    if (place / "refs").is_dir() and (place / "snapshots").is_dir():  # a hub cache's folder of one data set
        return _folder(_snapshot(place), split, name)
    if (place / "dataset_dict.json").exists():
        splits = sorted(p.name for p in place.iterdir() if (p / "state.json").exists())
        wanted = next((alias for alias in _aliases(base) if alias in splits), None)
        if wanted is None:
            raise DataError(f"saved data set '{place}' has no split '{base}': it has {', '.join(splits)}")
        return DataFiles(saved=place / wanted)
    if (place / "state.json").exists() and (place / "dataset_info.json").exists():
        return DataFiles(saved=place)
    every = [p for p in sorted(place.rglob("*")) if p.is_file() and not _hidden(p.relative_to(place))]
    files = [p for p in every if kind_of(p) is not None and p.name not in ("README.md", "dataset_infos.json")]
    if name is not None:
        files = [p for p in files if name in _words(p.relative_to(place))] or _no_name(place, files, name)
    named = [(p, _split_of(p.relative_to(place))) for p in files]
    chosen = [p for p, of in named if of == base] or [
        p for p, of in named if base in _words(p.relative_to(place))
    ]
    if not chosen and base == "train" and not any(of for _, of in named):
        chosen = files
    if not chosen:
        shown = ", ".join(str(p.relative_to(place)) for p in files[:8]) or "nothing that can be read"
        raise DataError(
            f"folder '{place}' has no file for split '{base}' (looked for {base}.jsonl, .json, ...; found {shown})"
        )
    top = [p for p in chosen if p.parent == place and p.name.split(".")[0] in _aliases(base)]
    if top:
        chosen = top[:1]
    folders = {p.parent for p in chosen}
    if len(folders) > 1 and name is None and not any(_split_of(f.relative_to(place)) for f in folders):
        options = ", ".join(sorted(str(f.relative_to(place)) for f in folders))
        raise DataError(f"folder '{place}' has several data sets ({options}): choose one with name")
    _check_shards(chosen)
    return DataFiles(tuple(chosen))


def _snapshot(place: Path) -> Path:
    reference = place / "refs" / "main"
    if reference.exists():
        return place / "snapshots" / reference.read_text().strip()
    snapshots = sorted((place / "snapshots").iterdir(), key=lambda p: p.stat().st_mtime)
    if not snapshots:
        raise DataError(f"hub cache '{place}' holds no snapshot: download the data set first")
    return snapshots[-1]


def _check_shards(files: list[Path]) -> None:
    for file in files:
        match = _SHARD.match(file.name)
        if match is None:
            continue
        beside = {p.name for p in files if p.parent == file.parent}
        for number in range(int(match.group(3))):
            wanted = file.name.replace(f"-{match.group(2)}-of-", f"-{number:05d}-of-")
            if wanted not in beside:
                raise DataError(f"shard '{file.parent / wanted}' is missing: {file.name} says there are {int(match.group(3))}")  # fmt: skip


def _readable(file: Path) -> Path:
    if kind_of(file) is None and file.suffix not in ("", *COMPRESSED):
        raise DataError(
            f"data file '{file}' has no known format ({file.suffix}): use {', '.join(KINDS)}, also compressed "
            f"({', '.join(COMPRESSED)})"
        )
    return file


def _words(path: Path) -> list[str]:
    return [word for word in re.split(r"[/_.\- ]+", str(path)) if word]


def _split_of(path: Path) -> str | None:
    words = [word.lower() for word in _words(path)]
    return next((split for split, aliases in SPLITS.items() if any(a in words for a in aliases)), None)


def _aliases(split: str) -> tuple[str, ...]:
    return SPLITS.get(split, (split,))


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _no_name(place: Path, files: list[Path], name: str) -> list[Path]:
    shown = ", ".join(str(p.relative_to(place)) for p in files[:8]) or "nothing"
    raise DataError(f"folder '{place}' has nothing named '{name}' (found {shown})")


def _near(place: Path) -> str:
    if not place.parent.is_dir():
        return ""
    close = difflib.get_close_matches(place.name, [p.name for p in place.parent.iterdir()], n=1)
    return f" (did you mean '{place.parent / close[0]}'?)" if close else ""
