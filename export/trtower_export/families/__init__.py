"""The architectures that can be exported. To add one: a module that defines FAMILY, and its line below."""

from trtower.errors import CheckpointError
from trtower_export.families import clip, dinov2
from trtower_export.families.base import Family

FAMILIES: tuple[Family, ...] = (
    clip.FAMILY,
    dinov2.FAMILY,
)


def family_of(model_type: str) -> Family:
    """Find the family of a config's `model_type`; raise CheckpointError listing those there are."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise CheckpointError(f"model_type {model_type!r} belongs to no family that trtower exports. It exports {known}.")


__all__ = ["FAMILIES", "Family", "family_of"]
