"""Bundles with projectors, of small models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.heads.models import KINDS, make
from trtower.spec import BatchProfile
from trtower_export.pipeline import ExportOptions, export_tower

Projected = Callable[..., Path]


@pytest.fixture(scope="session")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Projected:
    """Return a function that exports the tower and projector of a kind of model, once."""
    root = tmp_path_factory.mktemp("projected")
    made: dict[Any, Path] = {}

    def get(name: str, **options: Any) -> Path:
        assert name in KINDS
        if (key := (name, *sorted(options.items()))) not in made:
            checkpoint = root / name
            if not checkpoint.exists():
                make(name).save_pretrained(checkpoint)
            defaults: dict[str, Any] = {"head": "projector", "precision": "fp32", "flavour": "none", "check": False}
            defaults["profiles"] = (BatchProfile(min=1, opt=2, max=4),)
            made[key] = export_tower(str(checkpoint), root / f"b{len(made)}", ExportOptions(**defaults | options)).path
        return made[key]

    return get
