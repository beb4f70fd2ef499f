"""What undisturbed runs come to: made once a kind."""

from __future__ import annotations

from typing import Any

import pytest

from .runs import attempt, outcome, recipe_of


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run of a kind comes to, and how many file-system events it has; made once a kind."""
    made: dict[str, tuple[dict[str, Any], int]] = {}

    def of(kind: str) -> tuple[dict[str, Any], int]:
        if kind not in made:
            recipe = recipe_of(kind, tmp_path_factory.mktemp("undisturbed") / "run")
            done = attempt(recipe)
            assert done["exit"] == 0, done
            made[kind] = outcome(recipe), done["events"]
            assert made[kind][0]["result"]["verification"]["verified"], made[kind][0]["result"][
                "verification"
            ]
        return made[kind]

    return of
