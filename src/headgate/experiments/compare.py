"""``compare``: arms x seeds under one harness, paired; tuned alike; equal steps and equal time; a verdict.

Pairing is by construction: same seeds, same LoRA initialisation, same data order, same evaluation items in
every arm. What is computed here is written to ``comparison.json``; running again skips what is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from headgate.errors import ConfigError, DamagedFile, TrainingError
from headgate.experiments.arms import arm_recipes, check_comparison, tied_arms, tuning_metric, with_settings
from headgate.experiments.equal_dose import replaying
from headgate.experiments.equal_time import measured_steps
from headgate.experiments.executors import Executor, Task
from headgate.experiments.inputs import input_digests, require_same_defaults
from headgate.experiments.markdown import markdown
from headgate.experiments.metric import chosen_baseline, chosen_metric
from headgate.experiments.preflight import check_recipe
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import dump_recipe
from headgate.experiments.records import ComparisonTable, Figures
from headgate.experiments.run import Console, run
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.summary import summarise
from headgate.files import read_json, write_atomically

Key = TypeVar("Key", bound=Hashable)


def seeded(arm: Recipe, seed: int, first_seed: int) -> Recipe:
    """The arm at a seed. An arm without training is the same at every seed and runs once."""
    return arm.model_copy(update={"seed": first_seed if arm.steps_given == 0 else seed})


def is_done(recipe: Recipe) -> bool:
    """Whether the recipe's run is complete. Raises CheckpointError where its inputs have changed since."""
    directory = RunDirectory.of(recipe)
    if directory.status != "complete":
        return False
    require_same_defaults(directory, recipe)
    directory.require_same_inputs(input_digests(recipe))
    return True


class Comparison:
    """One comparison on disk: the folder, what was tuned, the calibration, the runs, the statistics."""

    def __init__(
        self,
        recipe: Recipe,
        say: Callable[[str], None] = lambda _line: None,
        console: Console | None = None,
        executor: Executor | None = None,
        allow_unverified: bool = False,
    ) -> None:
        self.recipe, self.say, self.console, self.executor = recipe, say, console, executor
        self.allow_unverified = allow_unverified
        if recipe.compare is None:
            raise ConfigError("this recipe has no compare: section: list its arms and seeds there")
        if recipe.compare.map is not None:
            raise ConfigError("this comparison is a map of many: compare each of compare_map.cells(recipe)")
        self.config = recipe.compare
        self.arms = arm_recipes(recipe)
        check_comparison(recipe, self.arms)
        if executor is None:  # another machine may have what this one lacks
            for arm in self.arms.values():
                check_recipe(arm)
        self.metric, self.baseline = chosen_metric(recipe), chosen_baseline(recipe)
        identity = json.dumps(
            [
                {name: arm.identity() for name, arm in self.arms.items()},
                self.config.model_dump(mode="json", exclude={"map"}),
            ],
            sort_keys=True,
        )
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        self.folder = Path(recipe.output_dir) / recipe.name / f"comparison-{digest}"
        self.state_file = self.folder / "state.json"
        self.state: dict[str, dict[str, dict[str, Any]]] = {"tuned": {}, "equal_time": {}}
        if self.state_file.exists():
            with suppress(
                DamagedFile
            ):  # torn: what was tuned and calibrated stands in complete runs, and is read again
                self.state |= read_json(self.state_file)

    def _save_state(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.state_file, json.dumps(self.state, indent=1))

    def _run(self, jobs: Mapping[Key, tuple[Recipe, str]]) -> Iterator[tuple[Key, RunDirectory]]:
        """Every job's complete run, made where it is missing: here in order, or by the executor as they end."""
        if self.executor is None:
            yield from ((key, self._run_here(recipe, label)) for key, (recipe, label) in jobs.items())
            return
        sharing: dict[str, list[Key]] = {}
        for key, (recipe, _) in jobs.items():
            sharing.setdefault(recipe.run_id(), []).append(key)
        missing = []
        for keys in sharing.values():
            recipe = jobs[keys[0]][0]
            if is_done(recipe):
                yield from ((key, RunDirectory.of(recipe)) for key in keys)
            else:
                missing.append(self._task(recipe))
        for event in self.executor.run(missing):
            if event.task is not None and event.kind == "ended":
                recipe, label = jobs[sharing[event.task.key][0]]
                directory = RunDirectory.of(recipe)
                self.say(f"{label}: {directory.status}: {directory.path}")
                if directory.status != "complete":
                    raise TrainingError(
                        f"{label} ended without a result: see {event.task.log}; run again to resume"
                    )
                yield from ((key, directory) for key in sharing[event.task.key])

    def _run_here(self, recipe: Recipe, label: str) -> RunDirectory:
        directory = RunDirectory.of(recipe)
        if not is_done(recipe):
            self.say(f"{label}: {directory.path}")
            return run(recipe, console=self.console)
        return directory

    def _task(self, recipe: Recipe) -> Task:
        file = self.folder / "recipes" / f"{recipe.run_id()}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, dump_recipe(recipe))
        return Task(recipe.run_id(), file, self.folder / "logs" / f"{recipe.run_id()}.log")

    def execute(self) -> ComparisonTable:
        """Tune, calibrate, run every arm at every seed, compute the statistics, write ``comparison.json``."""
        runs: dict[str, dict[int, RunDirectory]] = {name: {} for name in self.arms}
        self._note(runs)
        self._tune()
        self._note(runs)  # tuned arms are other runs
        tied = {**self._equal_time_arms, **self._replay_arms}
        self._run_arms([name for name in self.arms if name not in tied], runs)
        self._calibrate()
        self._run_arms(list(self._equal_time_arms), runs)
        self._run_arms(list(self._replay_arms), runs)
        self._require_verified(runs)
        report = summarise(self.recipe, runs, self.state)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "comparison.json", json.dumps(report, indent=1))
        write_atomically(self.folder / "comparison.md", markdown(report))
        return report

    def _require_verified(self, runs: Mapping[str, Mapping[int, RunDirectory]]) -> None:
        """A verdict is about what was saved. Raises TrainingError naming runs that are not what they report."""
        unverified = [
            f"{name}, seed {seed} ({directory.path})"
            for name, by_seed in runs.items()
            for seed, directory in by_seed.items()
            if not directory.verified
        ]
        if unverified and not self.allow_unverified:
            raise TrainingError(
                f"no verdict: {len(unverified)} runs are not verified, {unverified[0]} among them. `headgate verify` "
                "says what differs; run them again, or judge them all the same with --allow-unverified"
            )

    def _run_arms(self, names: Sequence[str], runs: dict[str, dict[int, RunDirectory]]) -> None:
        """The arms at every seed, all arms of a seed before the next seed."""
        seeds = self.config.seeds
        jobs = {
            (name, seed): (seeded(self._arm(name, seed, runs), seed, seeds[0]), f"{name}, seed {seed}")
            for seed in seeds
            for name in names
        }
        for (name, seed), directory in self._run(jobs):
            runs[name][seed] = directory
            self._note(runs)
        for name in names:
            runs[name] = {seed: runs[name][seed] for seed in seeds}

    def _arm(self, name: str, seed: int, runs: Mapping[str, Mapping[int, RunDirectory]]) -> Recipe:
        """The arm's recipe; one that replays knows the count of the other arm's run at this seed."""
        if name not in self._replay_arms:
            return self.arms[name]
        return replaying(self.arms[name], runs[self._replay_arms[name]][seed].result()["training"])

    def _note(self, runs: Mapping[str, Mapping[int, RunDirectory]]) -> None:
        """``progress.json``: what is planned and what has run, for the report of an unfinished comparison."""
        outline = {
            "name": self.recipe.name,
            "metric": ".".join(self.metric.path),
            "baseline": self.baseline,
            "seeds": self.config.seeds,
            "arms": {
                name: {
                    "runs": {str(seed): str(directory.path) for seed, directory in by_seed.items()},
                    "planned": self._planned(name),
                }
                for name, by_seed in runs.items()
            },
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "progress.json", json.dumps(outline, indent=1))

    def _planned(self, name: str) -> dict[str, str]:
        """Where the arm's run at each seed will lie, as soon as that is known: a tied arm waits for the other's runs."""
        if name in self._replay_arms or (
            name in self._equal_time_arms and name not in self.state["equal_time"]
        ):
            return {}
        seeds = self.config.seeds
        return {
            str(seed): str(RunDirectory.of(seeded(self.arms[name], seed, seeds[0])).path) for seed in seeds
        }

    @property
    def _equal_time_arms(self) -> dict[str, str]:
        """Arms that train for as long as another arm took: name -> that other arm."""
        return tied_arms(self.recipe, "equal_time")

    @property
    def _replay_arms(self) -> dict[str, str]:
        """Random gates that accept as many micro-batches as another arm did: name -> that other arm."""
        return tied_arms(self.recipe, "replay_of")

    def _calibrate(self) -> None:
        """Steps that fit in another arm's time: measured once, kept, used at every seed and after a restart."""
        for name, other in self._equal_time_arms.items():
            if name not in self.state["equal_time"]:
                self.state["equal_time"][name] = self._measured_steps(name, other)
                self._save_state()
            steps = self.state["equal_time"][name]["steps"]
            training = self.arms[name].training.model_copy(update={"max_steps": steps, "epochs": None})
            self.arms[name] = self.arms[name].model_copy(update={"training": training})

    def _measured_steps(self, name: str, other: str) -> dict[str, object]:
        def trained(arm: str, seed: int) -> Figures:
            timed = self.arms[arm].model_copy(update={"seed": seed, "evaluation": []})
            ((_, directory),) = self._run({arm: (timed, f"{name}: calibration of {arm}")})
            return directory.result()["training"]

        return measured_steps(trained, name, other, self._calibration_seeds, self.say)

    @property
    def _calibration_seeds(self) -> list[int]:
        return [seed for seed in range(1001, 1101) if seed not in self.config.seeds][:4]

    def _tune(self) -> None:
        """The best value of one key per arm, by validation, at a seed outside the comparison's."""
        tune = self.config.tune
        if tune is None:
            return
        metric, waiting = tuning_metric(tune.metric), list[str]()
        for name, arm in self.arms.items():
            if arm.steps_given == 0 or (tune.arms != "all" and name not in tune.arms):
                continue
            if name not in self.state["tuned"]:
                waiting.append(name)
        scores: dict[str, dict[str, float]] = {name: {} for name in waiting}
        jobs = {}
        for name in waiting:
            for value in tune.values:
                candidate = with_settings(self.arms[name], {tune.key: value, **tune.overrides})
                candidate = candidate.model_copy(update={"seed": tune.seed, "evaluation": []})
                jobs[name, str(value)] = (candidate, f"tune {name}: {tune.key}={value}")
        for (name, text), directory in self._run(jobs):
            scores[name][text] = metric.read(directory.result(), str(directory.path))
            if len(scores[name]) == len({str(value) for value in tune.values}):
                choose = max if metric.higher_is_better else min
                best = choose(tune.values, key=lambda value: scores[name][str(value)])
                self.state["tuned"][name] = {"key": tune.key, "value": best, "scores": scores[name]}
                self._save_state()
        for name, tuned in self.state["tuned"].items():
            if name in self.arms:
                self.arms[name] = with_settings(self.arms[name], {tune.key: tuned["value"]})
