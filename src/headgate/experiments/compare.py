"""``compare``: arms x seeds under one harness, paired; tuned alike; equal steps and equal time; a verdict.

Pairing is by construction: same seeds, same LoRA initialisation, same data order, same evaluation items in
every arm. What is computed here is written to ``comparison.json``; running again skips what is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headgate.errors import ConfigError
from headgate.experiments.markdown import markdown
from headgate.experiments.paths import with_paths
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import merge, recipe_from, set_dotted
from headgate.experiments.run import Console, run
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.summary import Metric, chosen_baseline, chosen_metric, summarise
from headgate.training.checkpoint import write_atomically


def base_content(recipe: Recipe) -> dict[str, Any]:
    """The recipe without its comparison: what every arm overrides."""
    return recipe.model_dump(mode="json", exclude={"compare", "sweep", "base"})


def arm_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """One recipe an arm, before seeds. Raises ConfigError naming the arm for bad keys or unequal evaluation."""
    assert recipe.compare is not None
    arms: dict[str, Recipe] = {}
    for name, override in recipe.compare.arms.items():
        content = merge(base_content(recipe), {k: v for k, v in override.items() if k != "equal_time"})
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


def seeded(arm: Recipe, seed: int, first_seed: int) -> Recipe:
    """The arm at a seed. An arm without training is the same at every seed and runs once."""
    return arm.model_copy(update={"seed": first_seed if arm.steps_given == 0 else seed})


class Comparison:
    """One comparison on disk: the folder, what was tuned, the calibration, the runs, the statistics."""

    def __init__(
        self, recipe: Recipe, say: Callable[[str], None] = lambda _line: None, console: Console | None = None
    ) -> None:
        self.recipe, self.say, self.console = recipe, say, console
        if recipe.compare is None:
            raise ConfigError("this recipe has no compare: section: list its arms and seeds there")
        self.config = recipe.compare
        self.arms = arm_recipes(recipe)
        self.metric, self.baseline = chosen_metric(recipe), chosen_baseline(recipe)
        self._check()
        identity = json.dumps(
            [{name: arm.identity() for name, arm in self.arms.items()}, self.config.model_dump(mode="json")],
            sort_keys=True,
        )
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        self.folder = Path(recipe.output_dir) / recipe.name / f"comparison-{digest}"
        self.state_file = self.folder / "state.json"
        self.state: dict[str, Any] = {"tuned": {}, "equal_time": {}}
        if self.state_file.exists():
            self.state = json.loads(self.state_file.read_text())

    def _check(self) -> None:
        """What is wrong with the comparison itself is an error now, not after the runs."""
        tune = self.config.tune
        if tune is not None and tune.seed in self.config.seeds:
            raise ConfigError(f"compare.tune.seed={tune.seed} is one of compare.seeds: tune at another seed")
        for name, other in self._equal_time_arms.items():
            if other not in self.config.arms:
                raise ConfigError(f"compare.arms.{name}.equal_time: there is no arm {other!r}")

    def _save_state(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.state_file, json.dumps(self.state, indent=1))

    def _run(self, recipe: Recipe, label: str) -> RunDirectory:
        directory = RunDirectory.of(recipe)
        if directory.status != "complete":
            self.say(f"{label}: {directory.path}")
            return run(recipe, console=self.console)
        return directory

    def execute(self) -> dict[str, Any]:
        """Tune, calibrate, run every arm at every seed, compute the statistics, write ``comparison.json``."""
        self._tune()
        seeds = self.config.seeds
        runs: dict[str, dict[int, RunDirectory]] = {name: {} for name in self.arms}
        plain = [name for name in self.arms if name not in self._equal_time_arms]
        for seed in seeds:
            for name in plain:
                runs[name][seed] = self._run(seeded(self.arms[name], seed, seeds[0]), f"{name}, seed {seed}")
            if seed == seeds[0]:
                self._calibrate(runs, seed)
            for name in self._equal_time_arms:
                runs[name][seed] = self._run(seeded(self.arms[name], seed, seeds[0]), f"{name}, seed {seed}")
        report = summarise(self.recipe, runs, self.state)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "comparison.json", json.dumps(report, indent=1))
        write_atomically(self.folder / "comparison.md", markdown(report))
        return report

    @property
    def _equal_time_arms(self) -> dict[str, str]:
        """Arms that train for as long as another arm took: name -> that other arm."""
        return {n: str(o["equal_time"]) for n, o in self.config.arms.items() if "equal_time" in o}

    def _calibrate(self, runs: Mapping[str, Mapping[int, RunDirectory]], seed: int) -> None:
        """Steps that fit in another arm's time: measured once, kept, used at every seed and after a restart."""
        for name, other in self._equal_time_arms.items():
            if name not in self.state["equal_time"]:
                target = runs[other][seed].result()["training"]
                own = self._run(
                    self.arms[name].model_copy(update={"seed": self._tune_seed, "evaluation": []}),
                    f"{name}: calibration",
                )
                mine = own.result()["training"]
                steps = max(1, round(target["seconds"] / (mine["seconds"] / mine["steps"])))
                self.state["equal_time"][name] = {"of": other, "seconds": target["seconds"], "steps": steps}
                self._save_state()
            steps = self.state["equal_time"][name]["steps"]
            training = self.arms[name].training.model_copy(update={"max_steps": steps, "epochs": None})
            self.arms[name] = self.arms[name].model_copy(update={"training": training})

    @property
    def _tune_seed(self) -> int:
        return self.config.tune.seed if self.config.tune is not None else 7

    def _tune(self) -> None:
        """The best value of one key per arm, by validation, at a seed outside the comparison's."""
        tune = self.config.tune
        if tune is None:
            return
        for name, arm in self.arms.items():
            if arm.steps_given == 0 or (tune.arms != "all" and name not in tune.arms):
                continue
            if name not in self.state["tuned"]:
                scores = {}
                for value in tune.values:
                    candidate = self._with(arm, tune.key, value).model_copy(
                        update={"seed": tune.seed, "evaluation": []}
                    )
                    done = self._run(candidate, f"tune {name}: {tune.key}={value:g}")
                    scores[str(value)] = Metric(("training", tune.metric)).read(done.result(), str(done.path))
                best = min(tune.values, key=lambda value: scores[str(value)])
                self.state["tuned"][name] = {"key": tune.key, "value": best, "scores": scores}
                self._save_state()
            self.arms[name] = self._with(arm, tune.key, self.state["tuned"][name]["value"])

    @staticmethod
    def _with(arm: Recipe, key: str, value: Any) -> Recipe:
        content = arm.model_dump(mode="json")
        set_dotted(content, key, value)
        return recipe_from(content)
