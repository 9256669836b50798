"""Gemma 3's projector: patches averaged over squares, an RMS norm, and a matrix."""

from typing import Any

from trtower_export.heads.base import projector_of


def _obstacle(config: Any) -> str | None:
    vision = config.vision_config
    side, tokens = vision.image_size // vision.patch_size, int(config.mm_tokens_per_image**0.5)
    if tokens**2 == config.mm_tokens_per_image and tokens and side % tokens == 0:
        return None
    return (
        f"mm_tokens_per_image={config.mm_tokens_per_image} is not a square grid that divides the {side} x {side} "
        "patches"
    )


HEADS = (projector_of("gemma3", "Gemma3MultiModalProjector", "mm_tokens_per_image", obstacle=_obstacle),)
