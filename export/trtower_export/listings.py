"""The commands that list what can be named."""

from typing import Annotated

import typer
from rich.console import Console

from trtower_export.arguments import JsonOption, not_empty
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


def targets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only those with this in their name.", parser=not_empty)
    ] = None,
    json_: JsonOption = False,
) -> int:
    """List the deployments for --target.

    With NAME, and in the JSON, each has its source and the day it was read.
    """
    from trtower_export.targets import search_targets
    from trtower_export.targets.table import print_sources, print_targets

    rows = search_targets(name or "")
    if json_:
        say(Console(), as_json(rows))
        return 0
    print_targets(Console(), rows)
    if name:
        print_sources(Console(), rows)
    return 0
