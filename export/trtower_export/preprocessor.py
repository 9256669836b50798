"""Make a checkpoint's image preprocessing produce exactly the pixels that its engine takes."""

from typing import Any

from trtower.image_processor import ImageProcessor
from trtower_export.checkpoint import Checkpoint
from trtower_export.progress import Progress


def fit_preprocessor(checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Give the preprocessor_config.json of a bundle; raise ConfigError where no tower could use it.

    DINOv2's checkpoints are trained at 518 and prepare images at 224: eager code interpolates the position
    embeddings then, an engine is fixed at one size S. The config is then scaled to S x S, keeping the share of the
    image that its crop keeps. What is changed or assumed is said.
    """
    written, family, size = checkpoint.preprocessor, checkpoint.family, checkpoint.config.image_size
    if written is None:
        written = family.preprocessor
        progress.say(
            f"no preprocessor_config.json in the checkpoint: images are prepared as {family.name} usually does"
        )
    processor = ImageProcessor(written)
    resized = processor.size.get("shortest_edge") or processor.size["height"]
    made = processor.crop_size["height"] if processor.do_center_crop else resized
    if made == size:
        return written
    if checkpoint.preprocessor is not None:
        progress.say(f"the checkpoint prepares {made} x {made} pixels: rewritten for the engine's {size}")
    square = {"height": size, "width": size}
    if processor.do_center_crop:
        edge = round(resized * size / made)
        return {**written, "do_resize": True, "size": {"shortest_edge": edge}, "crop_size": square}
    return {**written, "do_resize": True, "size": square}
