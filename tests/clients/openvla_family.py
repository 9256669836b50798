"""OpenVLA's model files, and those of its fork OpenVLA-OFT, and small random checkpoints of them.

The names of timm's ViTs fix their sizes, so they are the smallest DINOv2 there is, and SigLIP's so400m, which is the
only one with the same patches. The language model is small.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from made_up import LM_SHAPE

SIDE, ACTIONS, VOCABULARY = 56, 7, 32064
DINOV2, SIGLIP = "vit_small_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"
KINDS = {"dinosiglip-vit-so-224px": [DINOV2, SIGLIP], "dinov2-vit-l": [DINOV2]}
"""OpenVLA's names for towers, and what has their places here."""

EXACT = 1e-5
"""Relative to the largest feature, in FP32."""

HEADS: dict[str, list[str]] = {"none": [], "projector": ["--head", "projector"]}


class Files:
    """The three files of a clone's model, without the packages around them, which are for training."""

    def __init__(self, clone: Path) -> None:
        for package in ("prismatic", "prismatic.extern", "prismatic.extern.hf", "prismatic.training", "prismatic.vla"):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(clone.joinpath(*package.split(".")))]
        self.folder = clone / "prismatic" / "extern" / "hf"
        self.configuration, self.modeling, self.processing = (
            importlib.import_module(f"prismatic.extern.hf.{name}_prismatic")
            for name in ("configuration", "modeling", "processing")
        )

    def write_checkpoint(self, folder: Path, kind: str, strategy: str) -> Path:
        """Save a small OpenVLA with random weights, and its processor."""
        towers = KINDS[kind]
        self.configuration.VISION_BACKBONE_TO_TIMM_ID[kind] = towers
        self.configuration.VISION_BACKBONE_TO_RESOLUTION[kind] = [SIDE] * len(towers)
        config = self.configuration.OpenVLAConfig(
            vision_backbone_id=kind,
            llm_backbone_id="llama2-7b-pure",
            image_resize_strategy=strategy,
            text_config={**LM_SHAPE, "vocab_size": VOCABULARY},
            norm_stats={"made_up": {"action": {"q01": [-1.0] * ACTIONS, "q99": [1.0] * ACTIONS}}},
        )
        _randomised(self.modeling.OpenVLAForActionPrediction(config)).save_pretrained(folder)
        colours = [([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.5] * 3)][: len(towers)]
        self.processing.PrismaticImageProcessor(
            use_fused_vision_backbone=len(towers) == 2,
            image_resize_strategy=strategy,
            input_sizes=[(3, SIDE, SIDE)] * len(towers),
            interpolations=["bicubic"] * len(towers),
            means=[mean for mean, _ in colours],
            stds=[std for _, std in colours],
        ).save_pretrained(folder)
        return folder

    def load(self, folder: Path) -> Any:
        """Load a checkpoint with the clone's own class."""
        return self.modeling.OpenVLAForActionPrediction.from_pretrained(folder, torch_dtype=torch.float32).eval()

    def prepare(self, folder: Path, pictures: Any) -> torch.Tensor:
        """Prepare pictures with the clone's own processor."""
        processor = self.processing.PrismaticImageProcessor.from_pretrained(folder)
        pixels: torch.Tensor = processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels


def _randomised(model: Any) -> Any:
    """Draw every weight so that features keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = min(0.2, parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.1
        drawn = torch.randn(parameter.shape, generator=generator) * spread
        ones = name.endswith(("weight", "scale_factor")) and parameter.ndim == 1
        parameter.data = drawn + 1 if ones else drawn
    return model
