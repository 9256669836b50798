"""The architectures that can be exported. To add one, write a module that defines FAMILY, and add its name below."""

from importlib import import_module
from typing import Any

from trtower.errors import CheckpointError
from trtower_export.families.base import Family

FAMILIES: tuple[Family, ...] = tuple(
    import_module(f"{__name__}.{name}").FAMILY
    for name in (
        "clip",
        "metaclip_2",
        "siglip",
        "siglip2",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "internvl_vision",
        "aimv2",
        "eva_clip",
        "idefics3_vision",
        "smolvlm_vision",
        "prismatic",
    )
)

FREE_SHAPES = "its 2-D RoPE accepts pictures of any shape, an engine only one; choose a model whose tower has one size"
REFUSED = {
    "pixtral": FREE_SHAPES,
    "qwen2_vl": FREE_SHAPES,
    "qwen2_5_vl": FREE_SHAPES,
    "qwen3_vl": FREE_SHAPES,
    "kimi_vl": FREE_SHAPES,
    "Gr00tN1d7": FREE_SHAPES,
    "gr00t_n1": "its Eagle model differs from those of GR00T N1.5 and N1.6, which trtower exports",
    "intern_vit_6b": "it needs the checkpoint's own code; export its -hf conversion, an internvl_vision tower",
    "internvl_chat": "it needs the checkpoint's own code; export its -hf conversion, with an internvl_vision tower",
    "mlcd": "its layers rotate queries and keys in 2-D by another rule than DINOv3's; "
    "the nearest is a CLIP tower of its size",
    "timm_wrapper": "timm's models are read by themselves, not inside another; export a conversion to a family below",
}
"""Why some towers that people want have no family, and what to export instead, by the beginning of `model_type`."""


def is_exported(model_type: Any) -> bool:
    """Return whether a config's `model_type` belongs to a family."""
    return any(model_type in family.model_types for family in FAMILIES)


def family_of(model_type: str) -> Family:
    """Find the family of a config's `model_type`; raise CheckpointError with the reason and the families there are."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    reason = refusal(model_type)
    known = "; ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise CheckpointError(
        f"model_type {model_type!r} belongs to no family that trtower exports{f': {reason}' if reason else ''}. "
        f"It exports {known}."
    )


def refusal(model_type: str) -> str | None:
    """Return why towers of this `model_type` cannot be exported, and what to export instead; None if unknown."""
    return next((reason for begin, reason in REFUSED.items() if model_type.startswith(begin)), None)


__all__ = ["FAMILIES", "Family", "family_of", "is_exported", "refusal"]
