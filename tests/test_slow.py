"""Rehearse every recipe at full size. Run it before a release with `make test-slow`."""

from pathlib import Path

import pytest

from trtower.tower.vision_tower import VisionTower
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.recipes import all_recipes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe.name for recipe in all_recipes()])
def test_recipe_rehearses_at_full_size(recipe: str, tmp_path: Path) -> None:
    bundle = export_tower(recipe, tmp_path / recipe, ExportOptions(random_weights=True))
    manifest = bundle.manifest
    assert manifest.plans
    assert manifest.certificate
    assert manifest.certificate.passed
    size = manifest.spec.image_size
    tower = VisionTower.load(bundle.path)
    assert tower.image_processor.crop_size == {"height": size, "width": size}
