"""``headgate probe RECIPE``: can gating pay on this model and this data?"""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml

from headgate.cli.console import out
from headgate.cli.options import JsonOption, RecipeArgument, SetOption, read_recipe
from headgate.errors import ConfigError
from headgate.files import write_atomically


def probe(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    seconds: Annotated[
        float, typer.Option(help="Time to spend, about; fewer batches are looked at where it is short.")
    ] = 60.0,
    json_file: JsonOption = None,
) -> None:
    """Train a little as the recipe says, measure what rows are worth and what a gate would cost, and say whether it pays."""
    if seconds <= 0:
        raise ConfigError(f"--seconds {seconds:g}: give a time above 0")
    loaded = read_recipe(recipe, overrides)
    from headgate.experiments.probe import measure
    from headgate.experiments.probe_verdict import verdict

    found = verdict(measure(loaded, seconds, out.print))
    costs = f"a backward costs {found['rho']:.2f} forwards ({found['rho_flops']:.2f} in FLOPs)"
    out.print(f"rho           {costs}", highlight=False)
    out.print(f"w             a repeat is worth {found['w']:.2f} of a fresh row", highlight=False)
    out.print(f"rare          {found['rare_share']:.1%} of the rows stand out", highlight=False)
    for kind, scores in found["separability"].items():
        text = ", ".join(
            f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in scores.items()
        )
        out.print(f"AUROC {kind:<7} {text}", highlight=False)
    for a, bound in found["bound"].items():
        out.print(
            f"bound         at acceptance {a} an accepted batch must be worth {bound['worth_needed']:.2f} average ones: "
            f"w below {bound['w_needed']:.2f} (scored at a quarter of the depth: {bound['w_needed_early']:.2f})",
            highlight=False,
        )
    out.print(f"{'pays' if found['pays'] else 'does not pay'}: {found['why']}", highlight=False, markup=False)
    if found["form"]:
        block = yaml.safe_dump(
            {"methods": {"backward_gate": found["form"]}}, default_flow_style=None, sort_keys=False
        )
        out.print(block.rstrip(), highlight=False, markup=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json_file, json.dumps(found, indent=1))
