"""Local task files of lm-evaluation-harness, checked before anything runs."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path

import yaml

from headgate.errors import ConfigError

HIGHER_KEYS = {"task", "include", "dataset_path", "group", "tag", "task_alias"}


def check_task_files(path: Path) -> list[str]:
    """The task names in a YAML file or folder. Raises ConfigError naming the file and the field that is wrong."""
    from lm_eval.api.task import TaskConfig

    if not path.exists():
        raise ConfigError(f"task file {path} does not exist")
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"task folder {path} has no YAML file")
    allowed = {field.name for field in fields(TaskConfig)} | HIGHER_KEYS
    names = []
    for file in files:
        try:
            content = yaml.load(file.read_text(), Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is no YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: a task is a mapping of fields, this is {type(content).__name__}")
        if isinstance(content.get("task"), list):
            names.append(str(content.get("group", "")))
            continue
        for name in content:
            if name not in allowed:
                close = difflib.get_close_matches(str(name), allowed, n=1)
                hint = f": did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(allowed))})"
                raise ConfigError(f"{file}: unknown field {name!r}{hint}")
        if "task" not in content:
            if path.is_dir():
                continue  # a template that others include
            raise ConfigError(f"{file}: the field 'task' (its name) is missing")
        if "include" not in content:
            for needed in ("dataset_path", "doc_to_text", "doc_to_target"):
                if needed not in content and "custom_dataset" not in content:
                    raise ConfigError(f"{file}: the field {needed!r} is missing")
        names.append(str(content["task"]))
    return names


class _Loader(yaml.SafeLoader):
    """Reads harness files without running the functions they name."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")
