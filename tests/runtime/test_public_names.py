import subprocess
import sys

import pytest

import trtower


def test_public_names_are_these() -> None:
    assert sorted(trtower.__all__) == [
        "BackendError",
        "BatchReport",
        "BrokenExtraError",
        "BuildError",
        "Bundle",
        "BundleError",
        "CLIPVisionTower",
        "CLIPVisionTowerDynamicS2",
        "CLIPVisionTowerS2",
        "CheckpointError",
        "ConfigError",
        "EmbedOptions",
        "EmbedProgress",
        "EngineOptions",
        "Features",
        "InputError",
        "Installation",
        "MissingExtraError",
        "TrtowerError",
        "VisionTower",
        "__version__",
        "build_vision_tower",
        "embed_pictures",
        "encode_for",
        "install",
        "tune_bundle",
        "uninstall",
        "verify_bundle",
    ]
    for name in trtower.__all__:
        assert getattr(trtower, name)
        assert name in dir(trtower)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'trtower' has no attribute 'VisionTwoer'"):
        trtower.VisionTwoer  # type: ignore[attr-defined]  # noqa: B018


def test_names_load_only_when_they_are_used() -> None:
    script = """
import sys
from trtower import *
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    script = """
import sys
import trtower
assert issubclass(trtower.ConfigError, trtower.TrtowerError)
assert trtower.Bundle.__name__ == "Bundle"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
