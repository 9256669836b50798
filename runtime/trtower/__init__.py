"""trtower: the vision tower of a LLaVA-like model, compiled.

    import trtower
    trtower.install(model, "engines/clip-l")                  # into a loaded model that has this tower
    tower = trtower.VisionTower.load("engines/clip-l")        # or the tower by itself

Deployment imports this package. It needs torch and one backend; `trtower export` makes the bundles.
Public names are imported on first use, so that the command can print its help without torch.
"""

from typing import TYPE_CHECKING

from trtower.lazy import import_lazily

if TYPE_CHECKING:
    from trtower.bundle.bundle import Bundle
    from trtower.embedding.embed import EmbedProgress, embed_pictures
    from trtower.embedding.features import Features
    from trtower.embedding.options import EmbedOptions
    from trtower.errors import (
        BackendError,
        BrokenExtraError,
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
    from trtower.parity.verify import verify_bundle
    from trtower.runners.base import EngineOptions
    from trtower.runners.observation import BatchReport
    from trtower.runners.tune import tune_bundle
    from trtower.tower.llava import CLIPVisionTower, CLIPVisionTowerDynamicS2, CLIPVisionTowerS2, build_vision_tower
    from trtower.tower.vision_tower import VisionTower

__version__ = "0.1.0"

__all__ = [
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

if not TYPE_CHECKING:  # or a type checker would accept every name
    __getattr__, __dir__ = import_lazily(
        __name__,
        {
            "bundle.bundle": "Bundle",
            "embedding.embed": "EmbedProgress embed_pictures",
            "embedding.features": "Features",
            "embedding.options": "EmbedOptions",
            "errors": "BackendError BrokenExtraError BuildError BundleError CheckpointError ConfigError InputError "
            "MissingExtraError TrtowerError",
            "installation.encode": "encode_for",
            "installation.install": "Installation install uninstall",
            "parity.verify": "verify_bundle",
            "runners.base": "EngineOptions",
            "runners.observation": "BatchReport",
            "runners.tune": "tune_bundle",
            "tower.llava": "CLIPVisionTower CLIPVisionTowerDynamicS2 CLIPVisionTowerS2 build_vision_tower",
            "tower.vision_tower": "VisionTower",
        },
    )
