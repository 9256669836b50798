"""trtower: the vision tower of a LLaVA-like model, compiled.

This package is what deployment imports: torch and one backend. Bundles are made by `trtower export`.
"""

from trtower.bundle import Bundle
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
from trtower.tower import CLIPVisionTower, VisionTower, build_vision_tower

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BuildError",
    "Bundle",
    "BundleError",
    "CLIPVisionTower",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "MissingExtraError",
    "TrtowerError",
    "VisionTower",
    "__version__",
    "build_vision_tower",
]
