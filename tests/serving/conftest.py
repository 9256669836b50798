"""Bundles that real servers serve."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import CHOSEN_ON_A_CPU, Bundles
from tests.serving.towers import KINDS
from trtower import VisionTower


@pytest.fixture(scope="session")
def by_kind(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of bundles, each called by its kind."""
    root = tmp_path_factory.mktemp("served")
    return {kind: Path(shutil.copytree(bundles(**options), root / kind)) for kind, options in KINDS.items()}


@pytest.fixture(scope="session")
def towers(by_kind: dict[str, Path]) -> dict[str, VisionTower]:
    return {kind: VisionTower.load(bundle, CHOSEN_ON_A_CPU) for kind, bundle in by_kind.items()}
