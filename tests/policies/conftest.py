"""Policies of LeRobot, each made, saved and exported once."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.policies.small import KINDS, VISION, WIDTH, make_policy
from trtower_export import ExportOptions, export_tower
from trtower_export.policies import openpi

OPTIONS = ExportOptions(precision="fp32", flavour="none", check=False)
"""In FP32, so that actions are those of PyTorch but for the order of sums."""


@dataclass(frozen=True)
class Saved:
    """A policy as its user has it, and bundles of its tower by their head."""

    kind: str
    policy: Any
    folder: Path
    bundles: dict[str, Path]


@pytest.fixture(autouse=True, scope="session")
def small_recipe() -> Any:
    """Let the recipe of π describe the small tower: LeRobot's configs do not say how large it is."""
    recipe = openpi.pi_recipe()
    small = replace(recipe, config=recipe.config | VISION, model=recipe.model | {"text_config": {"hidden_size": WIDTH}})
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(openpi, "read_recipe", lambda name: {"pi0_base": small}[name])
        yield


@pytest.fixture(scope="session", params=KINDS)
def saved(request: pytest.FixtureRequest, small_recipe: None, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A policy of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    policy = make_policy(request.param, folder, empty_cameras=1)
    policy.save_pretrained(folder / "policy")
    bundles = {head: folder / head for head in ("none", "projector")}
    for head, bundle in bundles.items():
        export_tower(str(folder / "policy"), bundle, replace(OPTIONS, head=head))
    return Saved(request.param, policy, folder / "policy", bundles)
