"""trtower: the vision tower of a LLaVA-like model, compiled.

This package is what deployment imports: torch and one backend. Bundles are made by `trtower export`.
"""

from trtower.bundle.bundle import Bundle
from trtower.errors import (
    BackendError,
    BuildError,
    BundleError,
    CheckpointError,
    ConfigError,
    InputError,
    MissingExtraError,
    TrtowerError,
)
from trtower.installation.encode import encode_for
from trtower.installation.install import Installation, install, uninstall
from trtower.runners.base import EngineOptions
from trtower.runners.observation import BatchReport
from trtower.tower.llava import CLIPVisionTower, CLIPVisionTowerDynamicS2, CLIPVisionTowerS2, build_vision_tower
from trtower.tower.vision_tower import VisionTower

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BatchReport",
    "BuildError",
    "Bundle",
    "BundleError",
    "CLIPVisionTower",
    "CLIPVisionTowerDynamicS2",
    "CLIPVisionTowerS2",
    "CheckpointError",
    "ConfigError",
    "EngineOptions",
    "InputError",
    "Installation",
    "MissingExtraError",
    "TrtowerError",
    "VisionTower",
    "__version__",
    "build_vision_tower",
    "encode_for",
    "install",
    "uninstall",
]
