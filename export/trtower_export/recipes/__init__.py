"""What is known of well-known checkpoints: architecture, layer and profile, one TOML each.

A recipe gives an export its defaults, and is all that a rehearsal with random weights needs.
"""

import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

from trtower.spec import BatchProfile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One TOML. ``config`` is the vision config and ``preprocessor`` the preprocessor_config.json of the checkpoint.

    ``image_size`` is the size the tower is used at, where that is not its config's. A model whose tower has a recipe
    of its own names it as ``tower``, and says only what differs.
    """

    name: str
    checkpoint: str
    select_layer: int | str | list[int]
    select_feature: str
    batch: BatchProfile
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    image_size: int | None = None


RECIPES = resources.files(__name__)


def all_recipes() -> list[Recipe]:
    """Read every recipe, sorted by name."""
    names = (file.name.removesuffix(".toml") for file in RECIPES.iterdir() if file.name.endswith(".toml"))
    return [_parse(name) for name in sorted(names)]


def find_recipe(checkpoint: str) -> Recipe | None:
    """Find the recipe of a hub id, which is named as the checkpoint is there, or of the recipe's own name."""
    recipes = {recipe.name: recipe for recipe in all_recipes()}
    found = recipes.get(checkpoint.rpartition("/")[2])
    return found if found and checkpoint in (found.checkpoint, found.name) else None


def _parse(name: str) -> Recipe:
    data = _read(name)
    if "tower" in data:
        data = _read(data.pop("tower")) | data
    low, opt, high = data.pop("batch")
    return Recipe(name=name, batch=BatchProfile(min=low, opt=opt, max=high), **data)


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    return data
