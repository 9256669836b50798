"""Make a checkpoint's image preprocessing produce exactly the pixels that its engine takes."""

from typing import Any

from trtower.errors import CheckpointError
from trtower.image_processor import ImageProcessor
from trtower_export.checkpoint import Checkpoint
from trtower_export.progress import Progress

ONE_TILE = {
    "LlavaImageProcessor": "CLIPImageProcessor",
    "LlavaNextImageProcessor": "SiglipImageProcessor",
    "LlavaOnevisionImageProcessor": "SiglipImageProcessor",
    "AyaVisionImageProcessor": "SiglipImageProcessor",
    "BlipImageProcessor": "SiglipImageProcessor",
    "Cohere2VisionImageProcessor": "SiglipImageProcessor",
    "DINOv3ViTImageProcessor": "SiglipImageProcessor",
    "Gemma3ImageProcessor": "SiglipImageProcessor",
    "GotOcr2ImageProcessor": "SiglipImageProcessor",
    "Siglip2ImageProcessor": "SiglipImageProcessor",
}
"""Processors that cut pictures into tiles, pad them or patch them, and the one that makes a tile of a whole picture."""

PIXELS = {"do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"}
PIXELS |= {"rescale_factor", "do_normalize", "image_mean", "image_std"}
"""The settings that concern one tile."""


def fit_preprocessor(checkpoint: Checkpoint, size: int, progress: Progress) -> dict[str, Any]:
    """Give the preprocessor_config.json of a bundle for S pixels; raise ConfigError where no tower could use it.

    DINOv2's checkpoints are trained at 518 and prepare images at 224: eager code interpolates the position
    embeddings then, an engine is fixed at one size S. The config is then scaled to S x S, keeping the share of the
    image that its crop keeps. What is changed or assumed is said.
    """
    written, family = checkpoint.layout.preprocessor, checkpoint.family
    if written is None:
        written = family.preprocessor
        progress.say(
            f"no preprocessor_config.json in the checkpoint: images are prepared as {family.name} usually does"
        )
    written = _one_tile(written, size, progress)
    processor = ImageProcessor(written)
    resized = processor.size.get("shortest_edge") or processor.size["height"]
    made = processor.crop_size["height"] if processor.do_center_crop else resized
    if made == size:
        return written
    if checkpoint.layout.preprocessor is not None:
        progress.say(f"the checkpoint prepares {made} x {made} pixels: rewritten for the engine's {size}")
    square = {"height": size, "width": size}
    if processor.do_center_crop:
        edge = round(resized * size / made)
        return {**written, "do_resize": True, "size": {"shortest_edge": edge}, "crop_size": square}
    return {**written, "do_resize": True, "size": square}


def _one_tile(written: dict[str, Any], size: int, progress: Progress) -> dict[str, Any]:
    """Reduce a processor that does more to a picture to what it does to one tile."""
    kind = str(written.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    if kind not in ONE_TILE:
        return written
    tile = {name: value for name, value in written.items() if name in PIXELS}
    absent = [name for name in ("resample", "image_mean", "image_std") if tile.get(name) is None]
    if absent:
        raise CheckpointError(
            f"preprocessor_config.json leaves {absent[0]} to the defaults of {kind}: write it there, in a copy."
        )
    tile["image_processor_type"] = ONE_TILE[kind]
    if ONE_TILE[kind] == "SiglipImageProcessor":
        tile |= {"do_center_crop": False, "crop_size": None, "size": {"height": size, "width": size}}
    progress.say(
        f"{kind}: the bundle's image_processor makes one {size} x {size} tile; tiling and padding stay with you"
    )
    return tile
