"""The heads that can be exported. To add one, write a module that defines HEADS, and add its name below."""

from importlib import import_module
from typing import Any

from trtower_export.heads.base import Head, Parts

ALL_HEADS: tuple[Head, ...] = tuple(
    head
    for name in (
        "mm_projector",
        "llava",
        "vipllava",
        "paligemma",
        "gemma3",
        "internvl",
        "cohere",
        "idefics3",
        "eagle",
        "prismatic",
        "class_projection",
        "attention_pool",
        "class_token",
    )
    for head in import_module(f"{__name__}.{name}").HEADS
)

READS_TEXT = "its Q-Former also reads the question, so no engine of images can hold it"
REFUSED = {
    "instructblip": READS_TEXT,
    "instructblipvideo": READS_TEXT,
    "blip-2": "its Q-Former is a network of its own",
    "mllama": "its features pass a language model's cross-attention, not a projector",
}
"""Why some models' projectors have no head, by `model_type`. Their towers are exported without one."""


def find_head(kind: str, config: Any) -> Head | None:
    """Return the head of a kind that a config has; None if it has none that is known here."""
    return next((head for head in ALL_HEADS if head.kind == kind and head.is_of(config)), None)


__all__ = ["ALL_HEADS", "REFUSED", "Head", "Parts", "find_head"]
