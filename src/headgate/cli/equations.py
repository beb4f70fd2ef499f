"""``headgate equations``: each equation of a method's paper, the function that computes it, the tests that prove it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from headgate.cli.console import out
from headgate.experiments.equations import equations as equations_of
from headgate.experiments.equations import markdown


def equations(
    method: Annotated[str, typer.Argument(help="A method's name, yours included.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="As the table of the method's page.")
    ] = False,
) -> None:
    """Equation of the paper, function and line, tests."""
    found = equations_of(method)
    if as_json:
        print(json.dumps([equation.as_dict() for equation in found], indent=2))
    elif as_markdown:
        print(markdown(found))
    else:
        for equation in found:
            out.print(f"({equation.label})  {equation.formula}", markup=False)
            out.print(f"    {equation.file}:{equation.line}  {equation.function}", markup=False)
            for test in equation.tests:
                out.print(f"    {test}", markup=False)
