"""Put an exported folder on the Hugging Face hub, after a look at what a reader will find there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, and re-exported untyped

from headgate.errors import ConfigError, ModelError
from headgate.experiments.records import Content


@dataclass(frozen=True)
class Publication:
    """What would go: file -> bytes, and what a reader should be told first."""

    repo: str
    files: dict[str, int]
    card: Content
    warnings: list[str]


def look_at(folder: Path, repo: str) -> Publication:
    """Without the network. Raises ConfigError for a folder that is no export, a card without metadata, or a bad name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no repository name: write owner/name ({error})") from None
    if "/" not in repo:
        raise ConfigError(f"{repo!r} names no owner: write owner/name")
    if not (folder / "headgate_export.json").exists():
        raise ConfigError(
            f"{folder} is no export: write one with `headgate export RUN --to transformers` first"
        )
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    if not any(name.endswith(".safetensors") for name in files):
        raise ConfigError(f"{folder} holds no weights: export the run again")
    card = metadata(folder / "README.md")
    warnings = []
    if card.get("license") in (None, "other"):
        warnings.append("the licence is not filled in: export with --license, or edit the card")
    base = str(card.get("base_model", ""))
    if base.startswith((".", "/", "~")):
        warnings.append(f"base_model {base} is a local folder: write the hub's name of it into the card")
    return Publication(repo, files, card, warnings)


def metadata(path: Path) -> dict[str, object]:
    """The YAML block of a model card. Raises ConfigError where there is none."""
    parts = path.read_text().split("---", 2) if path.exists() else []
    found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} is no model card: it begins with no block of metadata between two lines of ---"
        )
    return found


def publish(folder: Path, publication: Publication, *, private: bool) -> str:
    """Create the repository if need be and upload the folder; returns its address.

    Raises ModelError where the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        api.create_repo(publication.repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=publication.repo, folder_path=folder, commit_message="Exported by headgate"
        )
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{publication.repo} could not be written: {str(error).splitlines()[0]} (log in with `hf auth login`; "
            "--dry-run needs no network)"
        ) from error
    return str(done)
