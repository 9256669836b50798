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
    """One TOML. ``config`` is the vision config and ``preprocessor`` the preprocessor_config.json of the checkpoint."""

    name: str
    checkpoint: str
    select_layer: int
    select_feature: str
    batch: BatchProfile
    config: dict[str, Any]
    preprocessor: dict[str, Any]


def all_recipes() -> list[Recipe]:
    """Read every recipe, sorted by name."""
    folder = resources.files(__name__)
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return [_parse(file.name.removesuffix(".toml"), file.read_text(encoding="utf-8")) for file in files]


def find_recipe(checkpoint: str) -> Recipe | None:
    """Find the recipe of a hub id, or of the recipe's own name."""
    return next((r for r in all_recipes() if checkpoint in (r.checkpoint, r.name)), None)


def _parse(name: str, text: str) -> Recipe:
    data = tomllib.loads(text)
    low, opt, high = data.pop("batch")
    return Recipe(name=name, batch=BatchProfile(min=low, opt=opt, max=high), **data)
