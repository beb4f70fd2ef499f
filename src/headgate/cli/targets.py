"""What a verb is pointed at: a run directory, a saved checkpoint, or a model by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

import headgate.serving  # noqa: F401  # an exported folder is a model by name
from headgate.errors import CheckpointError, ConfigError, ModelError
from headgate.experiments.run_directory import RunDirectory
from headgate.models.load import load_model
from headgate.models.places import is_local
from headgate.training.checkpoint import STRUCTURE_FILE, last_valid
from headgate.training.saved import load


def open_target(
    target: str, *, device: str = "auto", allow_partial: bool = False, adapter: str | None = None
) -> tuple[Any, Any, Path | None]:
    """(model, tokenizer, the run's folder or None). Refuses an unfinished run unless ``allow_partial``.

    ``adapter``: a PEFT adapter to put on a bare model; refused if it was made for another base.
    """
    path = Path(target)
    beside = path.parent != Path(".") and path.parent.is_dir() and not _in_hub_cache(target)
    if not path.exists() and (is_local(target) or beside):
        close = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*")], n=1)
        hint = f"did you mean {path.parent / close[0]}?" if close else "`headgate runs` lists what there is"
        raise CheckpointError(f"{target} does not exist: {hint}")
    if adapter is not None:
        if (path / "recipe.yaml").exists() or (path / STRUCTURE_FILE).exists():
            raise ConfigError(
                f"--adapter {adapter}: {target} brings its own adapter; name its base model instead"
            )
        if not Path(adapter).is_dir():
            raise ModelError(f"adapter folder {adapter!r} does not exist")
        model, tokenizer = load_model(target, device=device, adapter=adapter)
        return model.eval(), tokenizer, None
    if (path / "recipe.yaml").exists():
        directory = RunDirectory(path)
        if directory.status != "complete":
            if not allow_partial:
                raise CheckpointError(
                    f"{path} is {directory.status}: finish it with `headgate train`, or pass --allow-partial"
                )
            found = last_valid(directory.trainer_dir)
            if found is None:
                raise CheckpointError(f"{path} has no whole checkpoint yet")
            return (*load(found, device=device), path)
        if not directory.checkpoint.exists():
            recipe = directory.recipe()
            model, tokenizer = load_model(**{**recipe.model.model_dump(), "device": device})
            return model, tokenizer, path
        return (*load(path, device=device), path)
    if (path / STRUCTURE_FILE).exists():
        return (*load(path, device=device), path)
    model, tokenizer = load_model(target, device=device)
    return model, tokenizer, None


def _in_hub_cache(name: str) -> bool:
    """Whether the hub's local cache has a model of this name: a folder of the same owner's name then says nothing."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # no name that the hub could have
        return False
