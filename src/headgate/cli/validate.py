"""``headgate validate RECIPE``: check a recipe without loading a model, and print the plan."""

from __future__ import annotations

from headgate.cli.console import out
from headgate.cli.options import RecipeArgument, SetOption
from headgate.experiments.arms import arm_recipes, check_comparison
from headgate.experiments.compare_map import cells
from headgate.experiments.paths import with_paths
from headgate.experiments.preflight import check_recipe
from headgate.experiments.recipe_file import aliases_used, load_recipe


def validate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Check a recipe and the first rows of its data without loading a model, and print what it would do."""
    loaded = load_recipe(recipe, overrides or [])
    # each check imports what it needs: a wrong key is told before the data libraries are there, wrong data before models
    comparisons = []
    if loaded.compare is not None:
        comparisons = list([loaded] if loaded.compare.map is None else cells(loaded))
    arms_of = [arm_recipes(comparison) for comparison in comparisons]
    check_recipe(loaded)
    for comparison, arms in zip(comparisons, arms_of, strict=True):
        check_comparison(comparison, arms)
        for arm in arms.values():
            check_recipe(arm)
    from headgate.data.checks import check_data

    read = with_paths(loaded)
    lines = check_data(read.data, read.model.name_or_path, read.model.revision)
    if read.evaluation:
        from headgate.evaluation.checks import check_task
    for task in read.evaluation:
        check_task(task, whole=False)
    from headgate.experiments.plan import plan

    out.print(plan(loaded, aliases_used(recipe)))
    for line in lines:
        out.print(f"  data       {line.removeprefix('data.')}", markup=False)
    out.print("valid")
