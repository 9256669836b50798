"""List recipes with their checkpoint, family, image size and layer."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from trtower_export.console import new_table, print_whole
from trtower_export.families import family_of
from trtower_export.families.base import square
from trtower_export.recipes import Recipe

COLUMNS = ("name", "checkpoint", "family", "image_size", "select_layer")


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return one recipe as `trtower recipes --json` prints it."""
    config = AutoConfig.for_model(**recipe.config)
    family = family_of(config.model_type)
    return {
        "name": recipe.name,
        "checkpoint": recipe.checkpoint,
        "family": family.name,
        "image_size": recipe.image_size or family.image_size(config),
        "patch_size": square(config.patch_size),
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "select_layer": recipe.select_layer,
        "select_feature": recipe.select_feature,
        "batch": [recipe.batch.min, recipe.batch.opt, recipe.batch.max],
    }


def print_recipes(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print described recipes as a table, with every name in full."""
    columns = [column.replace("_", " ") for column in COLUMNS]
    table = new_table(*columns, left=columns)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in COLUMNS))
    print_whole(console, table)


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
