"""LeRobot's policies, as `save_pretrained` writes them: a config.json whose `type` names the policy.

Sources: `configuration_*.py` and `modeling_*.py` of LeRobot 0.4 to 0.6.
"""

from functools import partial
from typing import Any

from trtower_export.policies.base import Policy, PolicyTower, RawConfig, frames, side_of
from trtower_export.policies.openpi import SIDE, pi_recipe, unmerged

KNOWN = "the policies of LeRobot 0.4 to 0.6"

PI = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "π0-FAST"}


def cameras_of(raw: RawConfig) -> int | None:
    """Count the images that a policy's config names, and those that it adds for cameras that are missing."""
    features = raw.get("input_features")
    kinds = [each.get("type") for each in features.values() if isinstance(each, dict)] if features else []
    added = raw.get("empty_cameras") or 0
    named = sum("empty_camera_" in name for name in features or ())
    return (kinds.count("VISUAL") + max(0, added - named)) or None


def remarks_of(raw: RawConfig) -> tuple[str, ...]:
    """Say what a policy's own processors do before, which no bundle does."""
    mode = (raw.get("normalization_mapping") or {}).get("VISUAL", "IDENTITY")
    if mode == "IDENTITY":
        return ()
    return (
        f"the policy's own processor normalises frames by {mode} of its dataset before: encode does not, so pass it "
        "frames that are normalised, or the policy's images to the tower",
    )


def _pi_obstacle(raw: RawConfig) -> str | None:
    if "image_resolution" not in raw:
        return (
            "its config.json has no image_resolution, as that of LeRobot before 0.4 or after what is known here; "
            f"trtower knows {KNOWN}. Load the policy with one of these and save it again with save_pretrained()"
        )
    if not side_of(raw["image_resolution"]):
        return f"its image_resolution is {raw['image_resolution']!r}; expected the side of a square, twice"
    if raw["type"] == "pi0_fast" and side_of(raw["image_resolution"]) != SIDE:
        return f"its image_resolution is {raw['image_resolution']!r}, but π0-FAST builds its tower for {SIDE} pixels"
    return unmerged(raw)


def _read_pi(raw: RawConfig) -> PolicyTower:
    side = side_of(raw["image_resolution"])
    return PolicyTower(
        model=pi_recipe(),
        config={"image_size": side},
        preprocessor=frames("lerobot", side),
        cameras=cameras_of(raw),
        remarks=remarks_of(raw),
    )


def _smolvla_obstacle(raw: RawConfig) -> str | None:
    if not isinstance(raw.get("vlm_model_name"), str):
        return f"its config.json has no vlm_model_name, the model that its tower comes from; trtower knows {KNOWN}"
    if not side_of(raw.get("resize_imgs_with_padding")):
        return (
            f"its resize_imgs_with_padding is {raw.get('resize_imgs_with_padding')!r}, so its tower reads frames that "
            "are not squares of one size; an engine accepts only those"
        )
    return None


def _read_smolvla(raw: RawConfig) -> PolicyTower:
    side = side_of(raw["resize_imgs_with_padding"])
    return PolicyTower(
        model=str(raw["vlm_model_name"]),
        named_by="vlm_model_name",
        image_size=side,
        preprocessor=frames("smolvla", side),
        cameras=cameras_of(raw),
        remarks=(
            "SmolVLA multiplies what its connector returns by the root of its width, in embed_prefix: a bundle with a "
            "head holds the connector's own features, and the policy's code still multiplies them",
            *remarks_of(raw),
        ),
    )


def _is_of(kind: str, raw: RawConfig) -> bool:
    return raw.get("type") == kind and "model_type" not in raw


def _policy(kind: str, name: str, **others: Any) -> Policy:
    return Policy(name=f"{name} policy of LeRobot", is_of=partial(_is_of, kind), **others)


POLICIES = (
    *(_policy(kind, name, read=_read_pi, obstacle=_pi_obstacle) for kind, name in PI.items()),
    _policy("smolvla", "SmolVLA", read=_read_smolvla, obstacle=_smolvla_obstacle),
)

_QWEN = "its tower is Qwen's, which accepts pictures of any shape, an engine only one"
_RESNET = "it reads its cameras with a ResNet, which is not a vision transformer"
_SMALL = "it reads its cameras with a small convolutional network, which is not a vision transformer"
REFUSED = {
    "act": _RESNET,
    "diffusion": _RESNET,
    "vqbet": _RESNET,
    "tdmpc": _SMALL,
    "sac": _SMALL,
    "gaussian_actor": _SMALL,
    "eo1": _QWEN,
    "wall_x": _QWEN,
    "vla_jepa": _QWEN,
    "groot": "its tower is that of GR00T N1.7, Qwen's, which accepts pictures of any shape, an engine only one",
    "xvla": "its tower is Florence-2's DaViT, which mixes windows and channels; trtower exports plain ViTs",
    "molmoact2": "its tower is Molmo's, which trtower does not export",
    "fastwam": "it reads its cameras with Wan's video autoencoder, which is not a vision transformer",
    "lingbot_va": "it reads its cameras with Wan's video autoencoder, which is not a vision transformer",
}
"""Why the towers of LeRobot's other policies cannot be exported, by the `type` of their config."""
