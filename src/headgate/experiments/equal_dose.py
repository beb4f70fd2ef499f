"""A random gate that learns from exactly as many micro-batches as another arm did: `replay_of` in a comparison."""

from __future__ import annotations

from collections.abc import Mapping

from headgate.errors import ConfigError
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import recipe_from, set_dotted

METHOD = "backward_gate"


def check_replay(
    name: str, arm: Recipe, other: str, arms: Mapping[str, Recipe], replaying: Mapping[str, str]
) -> None:
    """Raise ConfigError where an arm has no count to replay, or no random gate to replay it with."""
    where = f"compare.arms.{name}.replay_of"
    if other not in arms:
        raise ConfigError(f"{where}: there is no arm {other!r}")
    if other in replaying or METHOD not in arms[other].methods:
        raise ConfigError(f"{where}: arm {other!r} has no {METHOD} of its own whose count could be replayed")
    if arm.methods.get(METHOD, {}).get("score") != "random":
        raise ConfigError(f"{where} is for a random gate: give the arm methods.{METHOD}.score: random")


def replaying(arm: Recipe, training: Mapping[str, object]) -> Recipe:
    """The arm with the count of micro-batches that a finished run accepted (``training`` is of its result)."""
    content = arm.model_dump(mode="json")
    set_dotted(content, f"methods.{METHOD}.replay", [training["accepted"], training["offered"]])
    return recipe_from(content)
