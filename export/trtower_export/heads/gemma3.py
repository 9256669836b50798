"""Gemma 3's projector: patches averaged over squares, an RMS norm, and a matrix."""

from typing import Any

from trtower_export.heads.base import Head, transformers_class

NAME = "Gemma3MultiModalProjector"


def _obstacle(config: Any) -> str | None:
    vision = config.vision_config
    side, tokens = vision.image_size // vision.patch_size, int(config.mm_tokens_per_image**0.5)
    if tokens**2 == config.mm_tokens_per_image and tokens and side % tokens == 0:
        return None
    return (
        f"mm_tokens_per_image={config.mm_tokens_per_image} is not a square grid that divides the {side} x {side} "
        "patches"
    )


HEADS = (
    Head(
        name=NAME,
        model_types=("gemma3",),
        attribute="multi_modal_projector",
        own=lambda config: transformers_class("gemma3", NAME)(config),
        obstacle=_obstacle,
    ),
)
