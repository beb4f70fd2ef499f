"""``headgate schema`` and ``headgate env``."""

from __future__ import annotations

import json

from headgate.experiments.environment import environment
from headgate.experiments.recipe_file import json_schema


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    print(json.dumps(json_schema(), indent=2))


def env() -> None:
    """Print versions and hardware, to paste into an issue."""
    found = environment()
    print(f"headgate {found['versions'].pop('headgate')}")
    for name, value in {
        **found["versions"],
        **found["hardware"],
        "git_revision": found["git_revision"],
    }.items():
        print(f"- {name}: {value}")
