"""Describe a robot policy: which model its tower comes from, and how it prepares the frames of its cameras."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtower.layer_codes import LayerCode
from trtower_export.recipes import Recipe

RawConfig = Mapping[str, Any]
"""What a policy's config.json holds."""


@dataclass(frozen=True, kw_only=True)
class PolicyTower:
    """What a policy's config says about its tower.

    Attributes:
        model: The vision-language model that the policy is built on: its recipe, its hub id or folder, or its config.
        named_by: The field of the config that names the model; "" if the policy's code does.
        config: What the policy's code changes in the model's vision config.
        image_size: S at which the policy uses the tower, in pixels a side; None if it is that of the vision config.
        preprocessor: How frames are prepared, as a preprocessor_config.json; None if as for the model.
        cameras: How many images the policy reads at a time; None if its config does not say.
        families: The families that its tower may be of; () if any.
        reads: The layer code and the tokens that the policy reads; None if the model's config says.
        remarks: What an export tells the user.
    """

    model: Recipe | str | dict[str, Any]
    named_by: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    preprocessor: dict[str, Any] | None = None
    cameras: int | None = None
    families: tuple[str, ...] = ()
    reads: tuple[LayerCode, str] | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A kind of robot policy, as one library saves it."""

    name: str
    """What messages call it, such as "π0 policy of LeRobot"."""

    is_of: Callable[[RawConfig], bool]
    """Config -> whether it is of such a policy."""

    read: Callable[[RawConfig], PolicyTower]
    """Config -> what it says about the tower."""

    obstacle: Callable[[RawConfig], str | None] = lambda raw: None
    """Config -> why its tower cannot be exported, and what can; None if it can."""


def frames(padding: str, side: int) -> dict[str, Any]:
    """Describe how a policy prepares frames: fitted into a square by ``padding``, with values from -1 to 1."""
    return {
        "image_processor_type": "ResizeWithPadImageProcessor",
        "resize_with_pad": padding,
        "size": {"height": side, "width": side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def side_of(resolution: Any) -> int:
    """Return the side of a square that a config writes as [n, n]; 0 if it is not a square."""
    sides = resolution if isinstance(resolution, list | tuple) and len(resolution) == 2 else (0, 0)
    side = sides[0] if sides[0] == sides[1] else 0
    return side if type(side) is int and side > 0 else 0
