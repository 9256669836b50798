"""Recipes for well-known checkpoints: architecture, layer and profile, one TOML file each.

An export takes its defaults from a recipe, and a rehearsal needs nothing else.
"""

import sys
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from trtower.spec import BatchProfile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One TOML file. ``config`` is the checkpoint's vision config and ``preprocessor`` its preprocessor_config.json.

    ``model`` holds what a projector needs of the config of the model around the tower; empty if the recipe does not
    describe a projector.

    ``image_size`` is the size at which the tower is used, if that is not its config's. If a model's tower has its own
    recipe, the model's file names that as ``tower`` and holds only what differs.
    """

    name: str
    checkpoint: str
    select_layer: int | str | list[int]
    select_feature: str
    batch: BatchProfile
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None


RECIPES = resources.files(__name__)


def all_recipes() -> list[Recipe]:
    """Read every recipe, sorted by name."""
    names = (file.name.removesuffix(".toml") for file in RECIPES.iterdir() if file.name.endswith(".toml"))
    return [read_recipe(name) for name in sorted(names)]


def find_recipe(checkpoint: str) -> Recipe | None:
    """Find a recipe by its name, or by its hub id if that ends in its name."""
    recipes = {recipe.name: recipe for recipe in all_recipes()}
    recipe = recipes.get(checkpoint.rpartition("/")[2])
    return recipe if recipe and checkpoint in (recipe.checkpoint, recipe.name) else None


def read_recipe(name: str) -> Recipe:
    """Read one of the recipes by its name."""
    data = _read(name)
    low, opt, high = data.pop("batch")
    return Recipe(name=name, batch=BatchProfile(min=low, opt=opt, max=high), **data)


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    return _read(data.pop("tower")) | data if "tower" in data else data
