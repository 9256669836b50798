"""Bundles of the towers that the small models have."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trtower.layer_codes import LayerCode

Bundles = Callable[..., Path]


@pytest.fixture(scope="session")
def bundles(export: Callable[..., Path]) -> Bundles:
    """Give bundles by tower, layer and precision, without a plan."""

    def get(tower: str = "clip", layer: LayerCode = -2, precision: str = "fp32", **options: object) -> Path:
        code = tuple(layer) if isinstance(layer, list) else layer
        return export(tower, select_layer=code, precision=precision, flavour="none", **options)

    return get
