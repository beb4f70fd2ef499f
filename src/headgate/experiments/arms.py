"""A comparison's arms as recipes, and all that can be wrong with a comparison before its first run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from headgate.errors import ConfigError
from headgate.experiments.equal_dose import check_replay
from headgate.experiments.metric import Metric, check_metric, chosen_baseline, chosen_metric
from headgate.experiments.paths import with_paths
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import merge, recipe_from, set_dotted

TIED = ("equal_time", "replay_of")
"""Keys of an arm that name another arm, whose runs come first; the others override the recipe."""


def arm_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """One recipe an arm, before seeds. Raises ConfigError naming the arm for bad keys or unequal evaluation."""
    assert recipe.compare is not None
    arms: dict[str, Recipe] = {}
    for name, override in recipe.compare.arms.items():
        content = merge(recipe.written(), {k: v for k, v in override.items() if k not in TIED})
        arms[name] = with_paths(recipe_from(content, f"compare.arms.{name}"))
    if not arms:
        raise ConfigError("compare.arms is empty: name at least one arm")
    first = next(iter(arms))
    for name, arm in arms.items():
        if arm.evaluation != arms[first].evaluation:
            raise ConfigError(
                f"arms {first!r} and {name!r} are evaluated on different items: give `evaluation` once, outside the arms"
            )
    return arms


def tied_arms(recipe: Recipe, key: str) -> dict[str, str]:
    """Arms that have ``equal_time`` (or ``replay_of``): name -> the arm that they name."""
    assert recipe.compare is not None
    return {name: str(override[key]) for name, override in recipe.compare.arms.items() if key in override}


def with_settings(arm: Recipe, overrides: Mapping[str, object]) -> Recipe:
    """The arm with dotted keys set."""
    content = arm.model_dump(mode="json")
    for key, value in overrides.items():
        set_dotted(content, key, value)
    return recipe_from(content)


def tuning_metric(name: str) -> Metric:
    """``compare.tune.metric`` as a path into a result."""
    return Metric(tuple(name.split(".")) if name.startswith("continual.") else ("training", name))


def check_comparison(recipe: Recipe, arms: Mapping[str, Recipe]) -> None:
    """What is wrong with the comparison itself is a ConfigError now, not after the runs."""
    config = recipe.compare
    assert config is not None
    chosen_baseline(recipe)
    replaying = tied_arms(recipe, "replay_of")
    for name, other in tied_arms(recipe, "equal_time").items():
        _require_arm(other, arms, f"compare.arms.{name}.equal_time")
    for name, other in replaying.items():
        check_replay(name, arms[name], other, arms, replaying)
    for pair in config.contrasts:
        for side in pair:
            _require_arm(side, arms, f"compare.contrasts: {list(pair)}")
    check_metric(chosen_metric(recipe), "compare.metric", arms)
    tune = config.tune
    if tune is None:
        return
    if tune.seed in config.seeds:
        raise ConfigError(f"compare.tune.seed={tune.seed} is one of compare.seeds: tune at another seed")
    if isinstance(tune.arms, str) and tune.arms != "all":
        raise ConfigError(f"compare.tune.arms={tune.arms!r}: write all, or a list of arms")
    if not tune.values:
        raise ConfigError("compare.tune.values is empty: give the values to choose from")
    for name in () if isinstance(tune.arms, str) else tune.arms:
        _require_arm(name, arms, "compare.tune.arms")
    tuned = {
        name: arm
        for name, arm in arms.items()
        if arm.steps_given != 0 and (tune.arms == "all" or name in tune.arms)
    }
    for value in tune.values:
        for name, arm in tuned.items():
            try:
                with_settings(arm, {tune.key: value, **tune.overrides})
            except ConfigError as error:
                raise ConfigError(f"compare.tune: arm {name!r} with {tune.key}={value!r}: {error}") from None
    check_metric(tuning_metric(tune.metric), "compare.tune.metric", tuned)


def _require_arm(name: str, arms: Mapping[str, Recipe], where: str) -> None:
    if name not in arms:
        close = difflib.get_close_matches(name, arms, n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{where}: there is no arm {name!r}{hint}")
