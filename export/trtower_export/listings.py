"""The commands that list what can be named."""

from rich.console import Console

from trtower_export.arguments import JsonOption
from trtower_export.console import as_json, say


def recipes(json_: JsonOption = False) -> int:
    """List the checkpoints that have a recipe.

    A recipe holds the defaults of an export, and lets a rehearsal run without the checkpoint.
    """
    from trtower_export.recipes import all_recipes
    from trtower_export.recipes.table import describe_recipe, print_recipes

    rows = [describe_recipe(recipe) for recipe in all_recipes()]
    if json_:
        say(Console(), as_json(rows))
    else:
        print_recipes(Console(), rows)
    return 0


def targets(json_: JsonOption = False) -> int:
    """List the deployments for --target.

    The JSON has the source of each row, and the day it was read.
    """
    from trtower_export.targets import all_targets
    from trtower_export.targets.table import print_targets

    if json_:
        say(Console(), as_json(all_targets()))
    else:
        print_targets(Console(), all_targets())
    return 0
