"""Make a checkpoint's image preprocessing produce exactly the pixels that its engine takes."""

from typing import Any

from trtower_export.progress import Progress


def fit_preprocessor(preprocessor: dict[str, Any], image_size: int, progress: Progress) -> dict[str, Any]:
    """Scale a preprocessor_config.json to S x S, keeping the share of the image that its crop keeps.

    DINOv2's checkpoints are trained at 518 and prepare images at 224: eager code interpolates the position
    embeddings then, an engine is fixed at one size. What is changed is said.
    """
    crop = _side(preprocessor["crop_size"]) if preprocessor.get("do_center_crop", True) else None
    resize = _side(preprocessor["size"])
    made = crop or resize
    if made == image_size:
        return preprocessor
    resized = round(resize * image_size / made)
    progress.say(f"preprocessor_config.json makes {made} x {made} pixels; rewritten for the engine's {image_size}")
    fitted = {**preprocessor, "size": {"shortest_edge": resized}, "do_resize": True}
    if crop is None:
        return {**fitted, "size": {"height": image_size, "width": image_size}}
    return {**fitted, "crop_size": {"height": image_size, "width": image_size}}


def _side(size: Any) -> int:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size)
