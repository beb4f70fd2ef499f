"""The laws of a Method's configuration."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap

from headgate.config import StrictConfig, build_config
from headgate.errors import ConfigError
from headgate.testing.case import Case
from headgate.testing.law import law


@law
def settings_survive_a_round_trip(case: Case) -> None:
    """A configuration dumped as JSON and read again is the same, and an unknown key is an error that names it."""
    kind = case.kind
    config = build_config(kind.Config, case.options)
    again = build_config(kind.Config, json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config, f"{again} is not {config}"
    try:
        build_config(kind.Config, {**case.options, "no_such_key": 1})
    except ConfigError as error:
        assert "no_such_key" in str(error), f"the error does not name the key: {error}"
    else:
        raise AssertionError("an unknown key is taken in silence")


@law
def every_setting_is_documented(case: Case) -> None:
    """The configuration's docstring, or a string below the field, says what each key means."""
    config = case.kind.Config
    documented = config.__doc__ or ""
    for base in config.__mro__:
        if isinstance(base, type) and issubclass(base, StrictConfig) and base is not StrictConfig:
            documented += " " + (base.__doc__ or "") + " " + " ".join(_field_strings(base))
    missing = [name for name in config.model_fields if name not in documented]
    assert not missing, f"not documented: {', '.join(missing)}"


def _field_strings(config: type) -> list[str]:
    """Names of the fields that have a string literal below them."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    pairs = zip(body.body, body.body[1:], strict=False)
    return [
        one.target.id
        for one, below in pairs
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    ]  # fmt: skip
